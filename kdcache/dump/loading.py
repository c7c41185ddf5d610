"""What a configuration of a dump loads: corpus, tokenizer, teacher, and the plan that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.fields import SEGMENT_IDS
from kdcache.cache.output_dir import refuse_foreign
from kdcache.codecs import vector_codec
from kdcache.corpus import Corpus, load_corpus
from kdcache.dump.batches import BatchRunner, Teacher
from kdcache.dump.config import DumpConfig
from kdcache.dump.pilot import layer_pilot
from kdcache.dump.plan import check_top_k, make_plan
from kdcache.errors import ConfigError, TeacherError
from kdcache.models.lm_head import head_to_bytes
from kdcache.models.loading import load_tokenizer, parse_dtype, pick_device
from kdcache.models.tokenizer import TextEncoder, tokenizer_files, tokenizer_record
from kdcache.progress import bar, reporter
from kdcache.schema import Plan
from kdcache.storage.folder import Folder
from kdcache.tasks import Sequences
from kdcache.teachers import HuggingFaceTeacher, load_teacher, parse_layers
from kdcache.teachers.outputs import outputs_record


@dataclass
class Parts:
    """What a configuration loads."""

    plan: Plan
    table: Any
    starts: NDArray[np.int64]
    sequences: Sequences
    teacher: HuggingFaceTeacher
    layers: list[int]
    tokenizer_files: dict[str, bytes]
    cache_files: dict[str, bytes]
    batch_tokens: int


def load_parts(config: DumpConfig, progress: bool) -> Parts:
    """Load what ``config`` names, cheapest first, so that most mistakes show before the teacher is loaded."""
    refuse_foreign(Folder(config.output))
    pick_device(config.teacher.device)
    if config.teacher.dtype != "auto":
        parse_dtype(config.teacher.dtype)
    task, settings = config.of_task, config.sequences
    corpus: Corpus = load_corpus(config.corpus, task.roles)
    name, revision = config.teacher.model, config.teacher.revision
    tokenizer = load_tokenizer(name, revision=revision, error=TeacherError)
    record = tokenizer_record(tokenizer)
    encoder = TextEncoder(tokenizer)
    outputs = outputs_record(config.teacher, task, settings, encoder)
    config = config.for_outputs(outputs)
    check_top_k(config, record.vocab_size if task.gives == "tokens" else config.targets.top_k)
    with bar(len(corpus), "tokenise", "doc", enabled=progress) as meter:
        sequences = task.plan(corpus, encoder, settings, outputs, reporter(meter))
    teacher = load_teacher(config.teacher, record.vocab_size, task, outputs)
    _check_length(sequences, teacher)
    if task.is_causal and SEGMENT_IDS in task.arrays(settings, outputs):
        teacher.check_packing()
    cache_files = {}
    names = list(config.hidden_states.layers)
    if config.targets.kind == "hidden":
        cache_files[layout.LM_HEAD] = head_to_bytes(teacher.head)
        names.append("last")
    layers = parse_layers(names, teacher.num_layers)
    pilot = layer_pilot(config, sequences, teacher, layers)
    plan, table, starts = make_plan(config, corpus, sequences, teacher.record, record, layers, pilot, outputs)
    batch_tokens = config.batch_tokens or min(4096 if teacher.device.type == "cpu" else 16384, teacher.max_batch_tokens)
    files = tokenizer_files(tokenizer)
    return Parts(plan, table, starts, sequences, teacher, layers, files, cache_files, batch_tokens)


def _check_length(sequences: Sequences, teacher: HuggingFaceTeacher) -> None:
    # Beyond its context a teacher with learnt positions fails, and one with rotary positions answers badly.
    if teacher.context_length is not None and sequences.longest > teacher.context_length:
        raise ConfigError(
            f"the longest sequence has {sequences.longest} positions, but {teacher.record.name} was made for "
            f"{teacher.context_length}; use --max-length {teacher.context_length} or less"
        )


def runner_of(teacher: Teacher, plan: Plan, layers: list[int]) -> BatchRunner:
    """Return what runs batches through ``teacher`` for ``plan``."""
    codecs = {name: vector_codec(plan.field(name).codec) for name in plan.vector_fields}
    return BatchRunner(teacher, plan.targets, layers, codecs)
