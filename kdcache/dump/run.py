"""Dumping: run the teacher over planned sequences and write what it knows, shard by shard.

`dump` is the whole loop over ready-made parts, which a test drives with a fake teacher; `dump_teacher` loads the parts
that a configuration names. Encoding and writing a shard happen in a second thread while the teacher works on the next
one: numpy, blosc and the disk release the GIL, so the teacher hardly notices.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import CacheWriter, Folder, ShardData, layout
from kdcache.cache.outputs import check_same_plan, refuse_foreign
from kdcache.cache.shard_file import pack
from kdcache.codecs import hidden_codec, id_dtype, targets_codec
from kdcache.codecs.hidden import relative_error
from kdcache.corpus import Corpus, SequencePlan, load_corpus, plan_sequences
from kdcache.dump.batches import BatchRunner, ShardRows, Teacher, batches_by_length
from kdcache.dump.config import DumpConfig
from kdcache.dump.plan import LayerPilot, check_top_k, make_plan
from kdcache.errors import ConfigError, TeacherError
from kdcache.models.lm_head import head_to_bytes
from kdcache.models.loading import load_tokenizer, parse_dtype, pick_device
from kdcache.models.tokenizer import TextEncoder, tokenizer_files, tokenizer_record
from kdcache.progress import bar, reporter
from kdcache.schema import Manifest, Plan, ShardRecord
from kdcache.tasks import causal_lm
from kdcache.teachers import HuggingFaceTeacher, load_teacher, parse_layers
from kdcache.teachers.huggingface import hidden_to_numpy

#: Positions that a dry run sends through the teacher, after as many for warming up.
_PILOT_POSITIONS = 2048
#: Positions that tell what a codec of hidden states costs.
_LAYER_PILOT_POSITIONS = 512


@dataclass
class DumpResult:
    """What a dump did: the finished manifest, and what this run added to it."""

    output: str
    manifest: Manifest
    num_shards_written: int
    num_positions_written: int
    teacher_s: float


@dataclass
class DumpEstimate:
    """What a dump would do, from its plan and a timed pilot."""

    output: str
    num_documents: int
    num_empty: int
    num_too_short: int
    num_sequences: int
    num_positions: int
    num_shards: int
    num_shards_committed: int
    bytes_per_token: float
    total_bytes: int
    tokens_per_s: float
    eta_s: float
    kept_mass: float
    teacher_loss: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass
class _Parts:
    """What a configuration loads."""

    plan: Plan
    table: Any
    starts: NDArray[np.int64]
    sequences: SequencePlan
    teacher: HuggingFaceTeacher
    layers: list[int]
    tokenizer_files: dict[str, bytes]
    cache_files: dict[str, bytes]
    batch_tokens: int


def dump_teacher(config: DumpConfig, *, progress: bool = True) -> DumpResult:
    """Run the teacher of ``config`` over its corpus and write (or finish) the cache at ``config.output``.

    Raises ``ConfigError``, ``CorpusError``, ``TeacherError`` or ``CacheError``; what was committed before stays, and
    the same call goes on from there.
    """
    parts = _load(config, progress)
    with CacheWriter(Folder(config.output)) as writer:
        return dump(
            parts.sequences,
            parts.teacher,
            parts.plan,
            writer,
            table=parts.table,
            starts=parts.starts,
            tokenizer_files=parts.tokenizer_files,
            cache_files=parts.cache_files,
            layers=parts.layers,
            batch_tokens=parts.batch_tokens,
            progress=progress,
        )


def dump(
    sequences: SequencePlan,
    teacher: Teacher,
    plan: Plan,
    writer: CacheWriter,
    *,
    table: Any,
    starts: NDArray[np.int64],
    tokenizer_files: dict[str, bytes],
    layers: list[int],
    batch_tokens: int,
    cache_files: dict[str, bytes] | None = None,
    progress: bool = False,
) -> DumpResult:
    """Write every shard of ``plan`` that is not committed yet, then the manifest."""
    missing = writer.begin(plan, table, tokenizer_files, cache_files)
    runner = _runner(teacher, plan, layers)
    ends = np.concatenate([[0], np.cumsum(sequences.lengths_N)])
    positions_of = [int(ends[starts[s + 1]] - ends[starts[s]]) for s in range(plan.num_shards)]
    todo = sum(positions_of[s] for s in missing)
    written: list[ShardRecord] = []
    began = time.perf_counter()
    with (
        bar(plan.num_positions, "teacher", "tok", enabled=progress, initial=plan.num_positions - todo) as meter,
        ThreadPoolExecutor(1, thread_name_prefix="kdcache-writer") as pool,
    ):
        pending: list[Future[ShardRecord]] = []
        for shard in missing:
            data = _run_shard(shard, sequences, starts, runner, batch_tokens, meter)
            # One shard may wait while another is written: memory is bounded by three of them.
            while len(pending) > 1:
                written.append(pending.pop(0).result())
            _show_bytes(meter, written)
            pending.append(pool.submit(writer.write_shard, data))
        teacher_s = time.perf_counter() - began
        written.extend(future.result() for future in pending)
        _show_bytes(meter, written)
    manifest = writer.finalise()
    return DumpResult(str(writer.folder), manifest, len(written), todo, teacher_s)


def estimate_dump(config: DumpConfig, *, progress: bool = True) -> DumpEstimate:
    """Plan the dump of ``config`` and time the teacher on a few batches; writes nothing.

    Raises what `dump_teacher` raises, also when the output holds another cache.
    """
    parts = _load(config, progress)
    plan, sequences = parts.plan, parts.sequences
    committed = _committed(config.output, plan)
    runner = _runner(parts.teacher, plan, parts.layers)
    chosen = _pilot_sequences(sequences, _PILOT_POSITIONS)
    warm = chosen[: max(1, len(chosen) // 4)]
    _run_rows(warm, sequences, runner, parts.batch_tokens)
    began = time.perf_counter()
    rows, picked = _run_rows(chosen, sequences, runner, parts.batch_tokens)
    elapsed = time.perf_counter() - began
    count = rows.targets.num_positions
    num_bytes = _encoded_bytes(rows, picked, plan)
    left = plan.num_positions * (1 - committed / max(plan.num_shards, 1))
    return DumpEstimate(
        output=config.output,
        num_documents=plan.corpus.num_documents,
        num_empty=plan.corpus.num_empty,
        num_too_short=plan.corpus.num_too_short,
        num_sequences=plan.num_sequences,
        num_positions=plan.num_positions,
        num_shards=plan.num_shards,
        num_shards_committed=committed,
        bytes_per_token=num_bytes / count,
        total_bytes=int(plan.num_positions * num_bytes / count),
        tokens_per_s=count / elapsed,
        eta_s=left * elapsed / count,
        kept_mass=float(-np.expm1(rows.targets.log_tail_P).mean()),
        teacher_loss=float(-rows.targets.gold_logprob_P.mean()),
    )


def _load(config: DumpConfig, progress: bool) -> _Parts:
    """Load what ``config`` names, cheapest first, so that most mistakes show before the teacher is loaded."""
    refuse_foreign(Folder(config.output))
    pick_device(config.teacher.device)
    if config.teacher.dtype != "auto":
        parse_dtype(config.teacher.dtype)
    corpus: Corpus = load_corpus(config.corpus)
    name, revision = config.teacher.model, config.teacher.revision
    tokenizer = load_tokenizer(name, revision=revision, error=TeacherError)
    record = tokenizer_record(tokenizer)
    check_top_k(config, record.vocab_size)
    with bar(len(corpus), "tokenise", "doc", enabled=progress) as meter:
        sequences = plan_sequences(corpus, TextEncoder(tokenizer), config.sequences, progress=reporter(meter))
    teacher = load_teacher(config.teacher, record.vocab_size)
    _check_length(sequences, teacher)
    if config.sequences.packing == "window" and not config.sequences.attend_across_documents:
        teacher.check_packing()
    cache_files = {}
    names = list(config.hidden_states.layers)
    if config.targets.kind == "hidden":
        cache_files[layout.LM_HEAD] = head_to_bytes(teacher.head)
        names.append("last")
    layers = parse_layers(names, teacher.num_layers)
    pilot = _layer_pilot(config, sequences, teacher, layers)
    plan, table, starts = make_plan(config, corpus, sequences, teacher.record, record, layers, pilot)
    batch_tokens = config.batch_tokens or min(4096 if teacher.device.type == "cpu" else 16384, teacher.max_batch_tokens)
    files = tokenizer_files(tokenizer)
    return _Parts(plan, table, starts, sequences, teacher, layers, files, cache_files, batch_tokens)


def _layer_pilot(
    config: DumpConfig, sequences: SequencePlan, teacher: HuggingFaceTeacher, layers: list[int]
) -> dict[int, LayerPilot]:
    """Run a few sequences for the width of each hidden state (OPT projects its last one) and what its codec costs."""
    if not layers:
        return {}
    codec = hidden_codec(config.hidden_states.codec)
    states: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in layers}
    for index in _pilot_sequences(sequences, _LAYER_PILOT_POSITIONS):
        for layer, found in teacher.run([sequences.sequence(index)], layers).hidden.items():
            states[layer].append(hidden_to_numpy(found))
    joined = {layer: np.concatenate(parts) for layer, parts in states.items()}
    return {layer: LayerPilot(rows.shape[1], relative_error(codec, rows)) for layer, rows in joined.items()}


def _check_length(sequences: SequencePlan, teacher: HuggingFaceTeacher) -> None:
    # Beyond its context a teacher with learnt positions fails, and one with rotary positions answers badly.
    longest = int(sequences.lengths_N.max())
    if teacher.context_length is not None and longest > teacher.context_length:
        raise ConfigError(
            f"the longest sequence has {longest} positions, but {teacher.record.name} was made for "
            f"{teacher.context_length}; use --max-length {teacher.context_length} or less"
        )


def _runner(teacher: Teacher, plan: Plan, layers: list[int]) -> BatchRunner:
    states = hidden_codec(plan.field(plan.hidden_layers[0]).codec if plan.hidden_layers else {"name": "bf16"})
    return BatchRunner(teacher, plan.targets, layers, states)


def _run_shard(
    shard: int,
    sequences: SequencePlan,
    starts: NDArray[np.int64],
    runner: BatchRunner,
    batch_tokens: int,
    meter: Any,
) -> ShardData:
    begin, end = int(starts[shard]), int(starts[shard + 1])
    lengths = sequences.lengths_N[begin:end]
    rows = ShardRows(lengths, begin, runner.record)
    members = [sequences.sequence(index) for index in range(begin, end)]
    for group in batches_by_length(lengths, batch_tokens):
        batch = [members[n] for n in group]
        runner.run(batch, rows.put)
        meter.update(sum(s.num_positions for s in batch))
    segments = [s.segment_ids_T for s in members if s.segment_ids_T is not None]
    return ShardData(
        index=shard,
        tokens_T=np.concatenate([s.tokens_T for s in members]),
        num_tokens_N=np.array([len(s.tokens_T) for s in members], dtype=np.int64),
        num_positions_N=lengths.astype(np.int64),
        loss_mask_P=np.concatenate([s.loss_mask_L for s in members]),
        labels_P=causal_lm.labels([s.tokens_T for s in members]),
        targets=rows.targets,
        table=sequences.sequence_table(begin, end),
        segment_ids_T=np.concatenate(segments) if segments else None,
        hidden=rows.hidden,
        tail_sum=runner.take_tail_sum(),
    )


def _run_rows(chosen: list[int], sequences: SequencePlan, runner: BatchRunner, batch_tokens: int) -> Any:
    """Run some sequences from anywhere in the corpus; return their rows and the sequences, renumbered from 0."""
    picked = []
    for number, index in enumerate(chosen):
        sequence = sequences.sequence(index)
        picked.append(type(sequence)(number, sequence.tokens_T, sequence.loss_mask_L, sequence.segment_ids_T))
    lengths = np.array([s.num_positions for s in picked], dtype=np.int64)
    rows = ShardRows(lengths, 0, runner.record)
    for group in batches_by_length(lengths, batch_tokens):
        runner.run([picked[n] for n in group], rows.put)
    return rows, picked


def _pilot_sequences(sequences: SequencePlan, num_positions: int) -> list[int]:
    """Return sequences spread evenly over the corpus with about ``num_positions`` (or all of a small corpus)."""
    mean = sequences.num_positions / max(sequences.num_sequences, 1)
    count = min(sequences.num_sequences, max(4, int(num_positions / mean) + 1))
    return np.unique(np.linspace(0, sequences.num_sequences - 1, count).astype(int)).tolist()


def _encoded_bytes(rows: ShardRows, picked: list[Any], plan: Plan) -> int:
    vocab_size = plan.tokenizer.vocab_size
    encoded = targets_codec(plan.field("targets").codec, plan.targets, vocab_size).encode(rows.targets)
    tokens = np.concatenate([s.tokens_T for s in picked])
    size = len(pack({**encoded, "tokens": tokens.astype(id_dtype(vocab_size))}))
    return size + sum(
        len(pack(hidden_codec(plan.field(name).codec).encode(staged))) for name, staged in rows.hidden.items()
    )


def _committed(output: str, wanted: Plan) -> int:
    """Return how many shards of the ``wanted`` cache exist; raises ``CacheError`` when ``output`` holds another."""
    folder = Folder(output)
    plan = layout.read_plan(folder)
    if plan is None:
        return 0
    check_same_plan(plan, wanted, folder)
    return sum(folder.exists(layout.commit_name(s)) for s in range(plan.num_shards))


def _show_bytes(meter: Any, written: list[ShardRecord]) -> None:
    if written:
        size = sum(record.num_bytes for record in written) / sum(record.num_positions for record in written)
        meter.set_postfix_str(f"{size:.0f} bytes/token, {len(written)} shards written")
