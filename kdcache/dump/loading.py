"""Load what the configuration of a dump names: corpus, tokenizer, teacher; and make their plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.output_dir import check_same_plan, refuse_foreign
from kdcache.corpus import Corpus, load_corpus
from kdcache.dump.config import DumpConfig
from kdcache.dump.pilot import layer_pilot
from kdcache.dump.plan import check_top_k, make_plan, sequences_record
from kdcache.errors import ConfigError, CorpusError, TeacherError, did_you_mean, shortened
from kdcache.fields import SEGMENT_IDS
from kdcache.models.tokenizer import TextEncoder, tokenizer_files, tokenizer_record
from kdcache.progress import bar, reporter, waiting
from kdcache.schema import Plan, TokenizerRecord
from kdcache.storage.folder import Folder
from kdcache.tasks import TASKS, Sequences
from kdcache.teachers.backends import BACKENDS
from kdcache.teachers.base import Request, Teacher, parse_layers

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What a configuration loads."""

    plan: Plan
    table: Any
    starts: NDArray[np.int64]
    sequences: Sequences
    teacher: Teacher
    tokenizer_files: dict[str, bytes]
    cache_files: dict[str, bytes]
    batch_tokens: int


def load_parts(config: DumpConfig, progress: bool, *, is_preview: bool = False) -> Parts:
    """Load what ``config`` names, cheapest first, so that most mistakes show before the teacher is loaded.

    With ``is_preview`` nothing will be written; see `kdcache.teachers.base.Backend.load`.
    """
    folder = Folder(config.output)
    refuse_foreign(folder)
    backend = BACKENDS[config.teacher.backend]
    backend.check(config.teacher)
    task, settings = config.of_task, config.sequences
    _check_columns(config)
    corpus: Corpus = load_corpus(config.corpus, task.roles, outputs=[folder.local_path] if folder.local_path else [])
    with waiting("load tokenizer", enabled=progress):
        tokenizer = backend.load_tokenizer(config.teacher)
    record = tokenizer_record(tokenizer)
    _check_begun(folder, config, corpus, record)
    # Random tokens of masked texts are sampled from the ids that the model has; other tasks take those of the text.
    encoder = TextEncoder(
        tokenizer,
        None if task.is_causal else backend.num_ids(config.teacher),
        add_special_tokens=getattr(settings, "add_special_tokens", True),
    )
    outputs = backend.outputs_record(config.teacher, task, settings, encoder)
    config = config.for_outputs(outputs)
    if task.gives == "tokens":
        check_top_k(config, record.vocab_size)
    with bar(len(corpus), "tokenise", "doc", enabled=progress) as meter:
        sequences = task.plan(corpus, encoder, settings, outputs, reporter(meter))
    remedy = "remove it from the texts"
    if hasattr(settings, "add_special_tokens"):
        remedy = f"set sequences.add_special_tokens=false, or {remedy}"
    for line in encoder.special_tokens_seen(remedy):
        log.warning("%s", line)
    with waiting("load teacher", enabled=progress):
        teacher = backend.load(config.teacher, record.vocab_size, task, outputs, is_preview=is_preview)
    config = config.for_teacher(teacher.capabilities)
    record = _of_the_model(record, teacher, sequences, tokenizer)
    _check_length(sequences, teacher)
    names = list(config.hidden_states.layers)
    targets = config.targets_config.record
    if targets.kind == "hidden":
        names.append("last")
    packed = task.is_causal and SEGMENT_IDS in task.arrays(settings, outputs)
    teacher.check(Request(targets, (0,) if names else (), outputs=outputs is not None, packed=packed))
    cache_files = {}
    if targets.kind == "hidden":
        from kdcache.models.lm_head import head_to_bytes
        from kdcache.teachers.logits import require_logits

        cache_files[layout.LM_HEAD] = head_to_bytes(require_logits(teacher, "targets of the kind hidden").head)
    layers = parse_layers(names, teacher.record.num_layers or 0)
    pilot = layer_pilot(config, sequences, teacher, layers)
    plan, table, starts = make_plan(config, corpus, sequences, teacher.record, record, layers, pilot, outputs)
    batch_tokens = config.batch_tokens or teacher.capabilities.batch_tokens
    files = tokenizer_files(tokenizer)
    return Parts(plan, table, starts, sequences, teacher, files, cache_files, batch_tokens)


def _of_the_model(record: TokenizerRecord, teacher: Teacher, sequences: Sequences, tokenizer: Any) -> TokenizerRecord:
    """Return ``record`` over the ids that the model has, of which a tokenizer may have more (Gemma 3).

    Raises ``TeacherError`` when a text uses one of the others.
    """
    num_ids = teacher.capabilities.num_ids
    if num_ids is None or num_ids >= record.vocab_size:
        return record
    for index in range(sequences.num_sequences):
        largest = int(sequences.sequence(index).tokens_T.max(initial=0))
        if largest >= num_ids:
            name = sequences.sequence_table(index, index + 1)["document_id"][0].as_py()
            raise TeacherError(
                f"document {shortened(name)} has the token {shortened(tokenizer.convert_ids_to_tokens(largest))} (id "
                f"{largest}), but {teacher.record.name} only has {num_ids} ids, and its tokenizer {record.vocab_size}; "
                "remove this token from the text, or use the tokenizer that belongs to the model"
            )
    log.warning(
        "the tokenizer has %d ids and %s %d: the others, such as %s, are in no text and are left out",
        record.vocab_size,
        teacher.record.name,
        num_ids,
        tokenizer.convert_ids_to_tokens(num_ids),
    )
    return record.model_copy(update={"vocab_size": num_ids})


def _check_columns(config: DumpConfig) -> None:
    """Raise ``CorpusError`` for a column of a role that the task does not have, naming the tasks that do."""
    roles = [role.name for role in config.of_task.roles]
    strange = next((name for name in config.corpus.columns if name not in roles), None)
    if strange is None:
        return
    others = [name for name, task in TASKS.importable().items() if strange in {role.name for role in task.roles}]
    hint = f"task {' and '.join(others)} does: choose it with --task" if others else did_you_mean(strange, roles)
    raise CorpusError(
        f"--column {strange}=NAME: task {config.task} reads no {strange!r}, but {', '.join(roles)}; {hint}"
    )


def _check_begun(folder: Folder, config: DumpConfig, corpus: Corpus, tokenizer: TokenizerRecord) -> None:
    """Raise ``CacheError`` when the output holds another cache, as far as that shows before the texts are tokenised.

    Reading the corpus for its fingerprint takes a small part of the time of tokenising it. Once the plan is made,
    `CacheWriter.begin` compares all of it.
    """
    existing = layout.read_plan(folder)
    if existing is None:
        return
    record = existing.corpus.model_copy(
        update={
            "text_field": corpus.text_field,
            "num_documents": len(corpus),
            "metadata_columns": tuple(corpus.metadata_columns),
        }
    )
    wanted = existing.model_copy(
        update={
            "task": config.task,
            # The teacher decides how many of its ids there are.
            "tokenizer": existing.tokenizer.model_copy(update={"sha256": tokenizer.sha256}),
            "corpus": record,
            "sequences": sequences_record(config.sequences),
            "targets": existing.targets.model_copy(update=_asked_for(config)),
        }
    )
    check_same_plan(existing, wanted, folder)
    record = record.model_copy(update={"fingerprint": corpus.fingerprint})
    check_same_plan(existing, wanted.model_copy(update={"corpus": record}), folder)


def _asked_for(config: DumpConfig) -> dict[str, Any]:
    """Return the members of the targets' record that are asked for explicitly; others may depend on the teacher."""
    if config.targets is None:
        return {}
    record = config.targets.record
    given = {name for name in config.targets.model_fields_set if getattr(config.targets, name) is not None}
    return {name: getattr(record, name) for name in given & set(type(record).model_fields)}


def _check_length(sequences: Sequences, teacher: Teacher) -> None:
    # Beyond its context a teacher with learnt positions fails, and one with rotary positions answers badly.
    limit = teacher.capabilities.context_length
    if limit is not None and sequences.longest > limit:
        raise ConfigError(
            f"the longest sequence has {sequences.longest} positions, but {teacher.record.name} was made for "
            f"{limit}; use --max-length {limit} or less"
        )
