"""Load what the configuration of a dump names: corpus, tokenizer, teacher; and make their plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.output_dir import refuse_foreign
from kdcache.corpus import Corpus, load_corpus
from kdcache.dump.config import DumpConfig
from kdcache.dump.pilot import layer_pilot
from kdcache.dump.plan import check_top_k, make_plan
from kdcache.errors import ConfigError
from kdcache.fields import SEGMENT_IDS
from kdcache.models.tokenizer import TextEncoder, tokenizer_files, tokenizer_record
from kdcache.progress import bar, reporter
from kdcache.schema import Plan
from kdcache.storage.folder import Folder
from kdcache.tasks import Sequences
from kdcache.teachers.backends import BACKENDS
from kdcache.teachers.base import Request, Teacher, parse_layers


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
    refuse_foreign(Folder(config.output))
    backend = BACKENDS[config.teacher.backend]
    backend.check(config.teacher)
    task, settings = config.of_task, config.sequences
    corpus: Corpus = load_corpus(config.corpus, task.roles)
    tokenizer = backend.load_tokenizer(config.teacher)
    record = tokenizer_record(tokenizer)
    encoder = TextEncoder(tokenizer)
    outputs = backend.outputs_record(config.teacher, task, settings, encoder)
    config = config.for_outputs(outputs)
    if task.gives == "tokens":
        check_top_k(config, record.vocab_size)
    with bar(len(corpus), "tokenise", "doc", enabled=progress) as meter:
        sequences = task.plan(corpus, encoder, settings, outputs, reporter(meter))
    teacher = backend.load(config.teacher, record.vocab_size, task, outputs, is_preview=is_preview)
    config = config.for_teacher(teacher.capabilities)
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


def _check_length(sequences: Sequences, teacher: Teacher) -> None:
    # Beyond its context a teacher with learnt positions fails, and one with rotary positions answers badly.
    limit = teacher.capabilities.context_length
    if limit is not None and sequences.longest > limit:
        raise ConfigError(
            f"the longest sequence has {sequences.longest} positions, but {teacher.record.name} was made for "
            f"{limit}; use --max-length {limit} or less"
        )
