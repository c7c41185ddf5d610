"""``kdcache estimate``: load teacher and corpus as a dump would, run a pilot, measure every preset; write nothing.

A pilot of a few thousand positions, spread over the corpus, gives bytes per token within a few percent (an interval
says how many), and every distance precisely enough to choose a preset. The time is that of the teacher plus reducing
its logits and encoding; a dump encodes in a second thread, so with a core to spare it is a little faster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.tail_prior import pack_prior
from kdcache.codecs import vector_codec
from kdcache.codecs.vectors import relative_error
from kdcache.config import build, merge
from kdcache.dump import DumpConfig, HiddenStatesConfig
from kdcache.dump.loading import Parts, load_parts
from kdcache.dump.pilot import pilot_sequences, run_pilot
from kdcache.dump.plan import LayerPilot, make_fields, shard_positions
from kdcache.errors import ConfigError, TeacherError, did_you_mean
from kdcache.estimate.choices import LossChoices, student_choices
from kdcache.estimate.measure import PresetMeasurement, measure
from kdcache.estimate.sample import HeadLogits, Logits, Sample, TeacherLogits
from kdcache.json_files import finite
from kdcache.models.lm_head import LMHead, head_to_bytes
from kdcache.presets import PRESETS, Preset
from kdcache.progress import bar, reporter
from kdcache.schema import Plan, TargetsRecord
from kdcache.tasks import task_of
from kdcache.teachers.base import Request
from kdcache.teachers.logits import LogitsTeacher, require_logits

log = logging.getLogger(__name__)

#: Loading the inputs of a dump needs an output; nothing is written to this one.
_NO_OUTPUT = "memory://kdcache-estimate"
_PILOT_RECORD = TargetsRecord(top_k=1)


@dataclass
class PresetEstimate:
    """What one preset would cost and keep; if it cannot be used, ``unavailable`` says why and the others are None."""

    name: str
    description: str
    unavailable: str | None = None
    measurement: PresetMeasurement | None = None
    best_tail: str | None = None
    """The tail handling with the smallest full-vocabulary KL; None with samples."""
    total_bytes: int | None = None
    dump_s: float | None = None
    cache_files: dict[str, int] = field(default_factory=dict)
    """Bytes of the files that a cache has once, by name; not in ``total_bytes``."""
    choices: list[LossChoices] = field(default_factory=list)


@dataclass
class EstimateResult:
    """A pilot of a dump: the corpus, the teacher's speed, and every preset."""

    teacher: str
    num_documents: int
    num_sequences: int
    num_positions: int
    pilot_positions: int
    pilot_sequences: int
    teacher_tokens_per_s: float
    teacher_loss: float
    presets: list[PresetEstimate]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; None for an infinite KL (a target of 0 where the teacher has mass)."""
        found: dict[str, Any] = finite(asdict(self))
        return found


def estimate_presets(
    config: DumpConfig, *, num_positions: int = 4096, presets: SequenceOf[str] = (), progress: bool = True
) -> EstimateResult:
    """Measure ``presets`` (default: all) for the teacher and the corpus of ``config``; writes nothing.

    ``num_positions`` is the size of the pilot; a smaller corpus is used whole. Output, targets and hidden states of
    ``config`` are ignored. Raises what `dump_teacher` raises, and ``ConfigError`` for an unknown preset.
    """
    chosen = _chosen(presets)
    if num_positions < 1:
        raise ConfigError(f"a pilot needs at least one position, found {num_positions}; the default is 4096")
    if config.targets is not None or config.hidden_states != HiddenStatesConfig():
        log.warning("targets and hidden_states are ignored: presets have their own")
    if config.of_task.gives != "tokens":
        raise ConfigError(
            f"task {config.task} stores all outputs of its teacher, so there are no presets to choose among; use "
            "kdcache dump-teacher --dry-run for the size"
        )
    pilot_targets = {"top_k": 1, "tail_prior": False}  # whatever the vocabulary, the pilot can keep them
    shared = config.model_dump(exclude={"targets", "hidden_states"})
    config = build(DumpConfig, {**shared, "output": _NO_OUTPUT, "targets": pilot_targets})
    parts = load_parts(config, progress, is_preview=True)
    sample, head, pilot = _pilot(parts, num_positions, progress)
    plans, reasons = _plans(config, parts, chosen, sample, head)
    with bar(2 * sample.num_positions, "measure", "tok", enabled=progress) as meter:
        report = reporter(meter)
        measured = measure(
            sample, plans, also=(_PILOT_RECORD,), report=lambda done: report(done, 2 * sample.num_positions)
        )
    whole_s = pilot.seconds / sample.num_positions
    # With a tiny teacher the reduction takes most of the time; the rest must not be a difference of noise.
    teacher_s = max(whole_s - measured.kept[_PILOT_RECORD].reduce_s / sample.num_positions, whole_s / 2)
    rows = [
        PresetEstimate(name, preset.description, reasons[name])
        if name in reasons
        else _estimate_of(name, preset, plans[name], measured.presets[name], teacher_s, head)
        for name, preset in chosen.items()
    ]
    return EstimateResult(
        teacher=parts.plan.teacher.name,
        num_documents=parts.plan.corpus.num_documents,
        num_sequences=parts.plan.num_sequences,
        num_positions=parts.plan.num_positions,
        pilot_positions=sample.num_positions,
        pilot_sequences=len(sample.sequences),
        teacher_tokens_per_s=1 / teacher_s,
        teacher_loss=pilot.teacher_loss,
        presets=rows,
    )


@dataclass
class _Pilot:
    """Seconds and loss of the teacher on the pilot."""

    seconds: float
    teacher_loss: float


def _chosen(names: SequenceOf[str]) -> dict[str, Preset]:
    for name in names:
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    return {name: PRESETS[name] for name in (names or PRESETS)}


def _pilot(parts: Parts, num_positions: int, progress: bool) -> tuple[Sample, LMHead | str, _Pilot]:
    """Run the teacher on sequences from all over the corpus; return them, and the LM head or why there is none."""
    teacher, sequences = require_logits(parts.teacher, "kdcache estimate"), parts.sequences
    indices = pilot_sequences(sequences, num_positions)
    head = _head_of(teacher)
    last = parts.plan.teacher.num_layers
    request = Request(_PILOT_RECORD, (last,) if isinstance(head, LMHead) and last is not None else ())
    with bar(1, "teacher", "run", enabled=progress) as meter:
        warm = indices[: max(1, len(indices) // 8)]
        run_pilot(warm, sequences, teacher, request, parts.batch_tokens)
        began = time.perf_counter()
        answer, _ = run_pilot(indices, sequences, teacher, request, parts.batch_tokens)
        seconds = time.perf_counter() - began
        meter.update()
    chosen = [sequences.sequence(index) for index in indices]
    # In one chunk, as a dump has it: chunks are written one by one.
    table = pa.concat_tables([sequences.sequence_table(index, index + 1) for index in indices]).combine_chunks()
    logits: Logits = TeacherLogits(teacher, chosen, parts.batch_tokens)
    if isinstance(head, LMHead):
        logits = HeadLogits(answer.vectors[parts.plan.states_field], head)
    sample = Sample(chosen, table, parts.plan.tokenizer.vocab_size, logits, task_of(parts.plan.task))
    assert answer.targets.gold_logprob_P is not None  # reduced from whole logits
    return sample, head, _Pilot(seconds, float(-answer.targets.gold_logprob_P.mean()))


def _head_of(teacher: LogitsTeacher) -> LMHead | str:
    try:
        return teacher.head
    except TeacherError as error:
        return str(error)


def _plans(
    config: DumpConfig, parts: Parts, chosen: dict[str, Preset], sample: Sample, head: LMHead | str
) -> tuple[dict[str, Plan], dict[str, str]]:
    """Return the plan of every preset, and why the others are unavailable."""
    plans, reasons = {}, {}
    for name, preset in chosen.items():
        settings = merge(config.model_dump(exclude={"targets", "hidden_states"}), preset.settings)
        own = build(DumpConfig, settings, source=f"preset {name}")
        if own.targets_config.kind == "hidden" and isinstance(head, str):
            reasons[name] = head
            continue
        states_PD = sample.logits.states_PD if isinstance(sample.logits, HeadLogits) else None
        try:
            plans[name] = plan_of(own, parts.plan, states_PD)
        except (ConfigError, TeacherError) as error:  # too many ids for the vocabulary; states the codec cannot hold
            reasons[name] = str(error)
    return plans, reasons


def plan_of(config: DumpConfig, base: Plan, states_PD: NDArray[np.float32] | None) -> Plan:
    """Return the plan ``base`` with the targets and fields of ``config``; states [P, D] are the last hidden ones."""
    layers, pilot = [], {}
    if config.targets_config.kind == "hidden":
        assert states_PD is not None
        assert base.teacher.num_layers is not None
        layers = [base.teacher.num_layers]
        error = relative_error(vector_codec(config.hidden_states.codec), states_PD)
        pilot = {layers[0]: LayerPilot(states_PD.shape[1], error)}
    return base.model_copy(
        update={
            "targets": config.targets_config.record,
            "fields": tuple(make_fields(config, base.teacher, base.tokenizer.vocab_size, layers, pilot)),
            "shard_positions": shard_positions(config, base, base.teacher, len(layers)),
        }
    )


def _estimate_of(
    name: str, preset: Preset, plan: Plan, found: PresetMeasurement, teacher_s: float, head: LMHead | str
) -> PresetEstimate:
    per_token_s = teacher_s + 1 / found.keep_tokens_per_s + 1 / found.encode_tokens_per_s
    return PresetEstimate(
        name=name,
        description=preset.description,
        measurement=found,
        best_tail=min(found.full_kl, key=found.full_kl.__getitem__) if found.full_kl else None,
        total_bytes=round(found.bytes_per_token * plan.num_positions),
        dump_s=per_token_s * plan.num_positions,
        cache_files=cache_file_bytes(plan, head),
        choices=student_choices(plan.targets, plan.tokenizer.vocab_size),
    )


def cache_file_bytes(plan: Plan, head: LMHead | str) -> dict[str, int]:
    """Return the bytes of the files that a cache of ``plan`` has once: the LM head, the tail prior."""
    files = {}
    if plan.targets.kind == "hidden" and isinstance(head, LMHead):
        files[layout.LM_HEAD] = len(head_to_bytes(head))
    if plan.targets.tail_prior:
        # Noise is what compresses least; a real prior is smaller by a few percent.
        prior_V = np.random.default_rng(0).random(plan.tokenizer.vocab_size, dtype=np.float32)
        files[layout.TAIL_PRIOR] = len(pack_prior(prior_V, dict.fromkeys(range(plan.num_shards), 1)))
    return files
