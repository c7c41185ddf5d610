"""Measure what a preset costs on disk and in time: encode the sample with the real codecs, and decode it.

The sample is cut into shards as a dump would cut it. It is mostly smaller than one shard, so what a shard has once
(metadata, tables of ids) is measured by writing a single row, and divided by the positions of a whole shard.

Not counted: what a cache has once, such as the manifest and the tokenizer.
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

from kdcache.cache import ShardBuilder, ShardData, layout
from kdcache.cache.shard_data import encode_field, with_statistics
from kdcache.cache.shard_file import pack, unpack
from kdcache.corpus import assign_shards
from kdcache.estimate.sample import Sample
from kdcache.fields import TARGETS_FIELD, TOKENS_FIELD, FieldKind, field_of, known_fields
from kdcache.schema import Plan, Targets
from kdcache.tasks import task_of

Arrays = dict[str, NDArray[Any]]
R = TypeVar("R")


@dataclass
class Stored:
    """A sample as a cache would store it.

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
            _store_field(field_of(record, plan), data, plan, totals)
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


def _store_field(field: FieldKind, data: ShardData, plan: Plan, totals: _Totals) -> None:
    (arrays, packed), seconds = best_of_two(partial(_encode, field, data))
    totals.encode_s += seconds
    single = {path: values if path.startswith("table/") else values[:1] for path, values in arrays.items()}
    _add(totals, field.name, len(packed), len(pack(single)), data, plan)
    decoded, seconds = best_of_two(partial(_decode, field, arrays, packed))
    totals.decode_s += seconds
    if isinstance(decoded, Targets):
        totals.targets.append(decoded)
    elif field.name != TOKENS_FIELD:
        totals.states.setdefault(field.name, []).append(decoded)


def _encode(field: FieldKind, data: ShardData) -> tuple[Arrays, bytes]:
    arrays = encode_field(field, data)
    return arrays, pack(arrays)


def _decode(field: FieldKind, arrays: Arrays, packed: bytes) -> Any:
    expected = {array.path: (array, len(arrays[array.path])) for array in field.record.arrays}
    unpacked = unpack(packed, expected, f"field {field.name}")
    decoded = field.decode(field.open({array.name: unpacked[array.path] for array in field.record.arrays}))
    if isinstance(decoded, Targets):
        decoded.merged()  # what losses see; nothing to do where there are no samples
    return decoded


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
    totals.add_bytes(name, whole, once, data.num_positions, shard_positions)


def _shards(sample: Sample, plan: Plan, targets: Targets, states_PD: NDArray[np.float32] | None) -> Iterator[ShardData]:
    starts = assign_shards(sample.lengths_N, plan.shard_positions).tolist()
    offsets = np.concatenate([[0], np.cumsum(sample.lengths_N)]).tolist()
    fields = known_fields(plan)
    for number, (begin, end) in enumerate(pairwise(starts)):
        rows = slice(offsets[begin], offsets[end])
        staged: dict[str, Any] = {TARGETS_FIELD: targets.take(rows)}
        for name in plan.hidden_layers:
            assert states_PD is not None
            staged[name] = fields[name].stage(states_PD[rows])
        builder = ShardBuilder(number, fields)
        builder.put(range(end - begin), sample.sequences[begin:end], staged)
        yield builder.build(sample.table.slice(begin, end - begin), task_of(plan.task).stored_labels)
