"""What a preset costs on disk and in time: the sample goes through the real codecs into real objects, and back.

The sample is cut into shards as a dump would cut it. A sample is mostly smaller than one shard, so what a shard has
once (metadata, tables of ids) is told apart from what every row costs, by writing a single row, and shared out to the
positions of a whole shard.

Not counted: what a cache has once, the manifest and the tokenizer among it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import ShardData, layout
from kdcache.cache.shard_data import encode_field, with_statistics
from kdcache.cache.shard_file import pack, unpack
from kdcache.codecs import targets_codec, vector_codec
from kdcache.corpus import assign_shards
from kdcache.estimate.sample import Sample
from kdcache.schema import FieldRecord, Plan, Targets

Arrays = dict[str, NDArray[Any]]
R = TypeVar("R")


@dataclass
class Stored:
    """A sample as a cache holds it.

    ``bytes_by_field`` per position, the per-sequence table among them; ``targets`` and ``states`` (by field) as a
    reader gets them back; seconds that encoding (compression included) and decoding took, on one thread each.
    """

    bytes_by_field: dict[str, float]
    targets: Targets
    states: dict[str, NDArray[np.float32]]
    encode_s: float
    decode_s: float

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per position."""
        return sum(self.bytes_by_field.values())


@dataclass
class _Totals:
    """Sums over the shards of a sample."""

    num_bytes: dict[str, float] = field(default_factory=dict)
    targets: list[Targets] = field(default_factory=list)
    states: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    encode_s: float = 0.0
    decode_s: float = 0.0

    def add_bytes(self, name: str, whole: int, once: int, num_positions: int, shard_positions: int) -> None:
        share = num_positions / max(shard_positions, num_positions)
        self.num_bytes[name] = self.num_bytes.get(name, 0.0) + whole - once + once * share


def store(sample: Sample, plan: Plan, targets: Targets, states_PD: NDArray[np.float32] | None = None) -> Stored:
    """Encode and decode ``targets`` of ``sample`` (and its last hidden states, where the plan has that field)."""
    totals = _Totals()
    for data in _shards(sample, plan, targets, states_PD):
        for record in plan.fields:
            _store_field(record, data, plan, totals)
        table = with_statistics(data)
        whole, once = (len(layout.table_to_ipc(part)) for part in (table, table.slice(0, 1)))
        _add(totals, layout.SEQUENCES_FIELD, whole, once, data, plan)
    return Stored(
        {name: size / sample.num_positions for name, size in totals.num_bytes.items()},
        Targets.concatenate(totals.targets),
        {name: np.concatenate(parts) for name, parts in totals.states.items()},
        totals.encode_s,
        totals.decode_s,
    )


def _store_field(record: FieldRecord, data: ShardData, plan: Plan, totals: _Totals) -> None:
    encode = partial(_encode, record, data, plan)
    (arrays, packed), seconds = best_of_two(encode)
    totals.encode_s += seconds
    single = {path: values if path.startswith("table/") else values[:1] for path, values in arrays.items()}
    _add(totals, record.name, len(packed), len(pack(single)), data, plan)
    decoded, seconds = best_of_two(partial(_decode, record, arrays, packed, plan))
    totals.decode_s += seconds
    if isinstance(decoded, Targets):
        totals.targets.append(decoded)
    else:
        totals.states.setdefault(record.name, []).append(decoded)


def _encode(record: FieldRecord, data: ShardData, plan: Plan) -> tuple[Arrays, bytes]:
    arrays = encode_field(record, data, plan)
    return arrays, pack(arrays)


def _decode(record: FieldRecord, arrays: Arrays, packed: bytes, plan: Plan) -> Targets | NDArray[np.float32]:
    expected = {array.path: (array, len(arrays[array.path])) for array in record.arrays}
    opened = unpack(packed, expected, f"field {record.name}")
    values = {array.name: opened[array.path] for array in record.arrays}
    if record.name != layout.TARGETS_FIELD:
        return vector_codec(record.codec).decode(values)
    codec = targets_codec(record.codec, plan.targets, plan.tokenizer.vocab_size)
    targets = codec.decode(codec.open(values))
    targets.merged()  # what losses see; nothing to do where there are no samples
    return targets


def best_of_two(work: Callable[[], R]) -> tuple[R, float]:
    """Return the result and the seconds of the faster of two runs; the first one also warms memory and caches up.

    Seconds are those that this thread had a core, so that other work on the machine does not count.
    """
    times = []
    for _ in range(2):
        began = time.thread_time()
        result = work()
        times.append(time.thread_time() - began)
    return result, max(min(times), 1e-9)


def _add(totals: _Totals, name: str, whole: int, once: int, data: ShardData, plan: Plan) -> None:
    shard_positions = min(plan.shard_positions, plan.num_positions)
    totals.add_bytes(name, whole, once, data.targets.num_positions, shard_positions)


def _shards(sample: Sample, plan: Plan, targets: Targets, states_PD: NDArray[np.float32] | None) -> Iterator[ShardData]:
    starts = assign_shards(sample.lengths_N, plan.shard_positions).tolist()
    offsets = np.concatenate([[0], np.cumsum(sample.lengths_N)]).tolist()
    for number, (begin, end) in enumerate(pairwise(starts)):
        members, rows = sample.sequences[begin:end], slice(offsets[begin], offsets[end])
        segments = [s.segment_ids_T for s in members if s.segment_ids_T is not None]
        token_indices = [s.token_index_L for s in members if s.token_index_L is not None]
        yield ShardData(
            index=number,
            tokens_T=np.concatenate([s.tokens_T for s in members]),
            num_tokens_N=np.array([len(s.tokens_T) for s in members], dtype=np.int64),
            num_positions_N=sample.lengths_N[begin:end],
            loss_mask_P=np.concatenate([s.loss_mask_L for s in members]),
            labels_P=sample.labels_P[rows],
            targets=targets.take(rows),
            table=sample.table.slice(begin, end - begin),
            segment_ids_T=np.concatenate(segments) if segments else None,
            token_index_P=np.concatenate(token_indices) if token_indices else None,
            hidden=_staged(plan, states_PD, rows),
        )


def _staged(plan: Plan, states_PD: NDArray[np.float32] | None, rows: slice) -> Arrays:
    if not plan.hidden_layers:
        return {}
    assert states_PD is not None
    return {name: vector_codec(plan.field(name).codec).stage(states_PD[rows]) for name in plan.hidden_layers}
