"""Measure what a preset costs on disk and in time: encode the sample with the real codecs, and decode it.

The sample is cut into shards as a dump would cut it. It is mostly smaller than one shard, so what a shard has once
(metadata, tables of ids) is measured by writing a single row, and divided by the positions of a whole shard.

Documents differ, so the bytes of a small sample are uncertain. `Stored.interval` says how much, from groups of
sequences that are encoded on their own, which costs two more encodings. The residuals of `_GROUPS` groups from the
common ratio of bytes to positions give its variance. And few positions compress otherwise than many: larger shards have
more different ids, and their compression learns more. The difference between two halves and the whole sample
tells what a doubling changes; the interval reaches `_DOUBLINGS` times as far in that direction.

Not counted: what a cache has once, such as the manifest and the tokenizer.
"""

from __future__ import annotations

import math
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

#: Groups of sequences that tell how uncertain the bytes are.
_GROUPS = 10
#: What all larger samples may change, in changes of the last doubling.
_DOUBLINGS = 2
#: 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom. Sequences are few, and of unequal
#: lengths, so the intervals hold less than 95 %: of a small model's cache of Wikipedia, the whole corpus's bytes in
#: 73 % (ragged) and 97 % (compact) of the pilots of 600 positions, in 90 % and 93 % of those of 1,600.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Stored:
    """A sample as a cache would store it.

    ``bytes_by_field`` per position, the per-sequence table among them; ``targets`` and ``states`` (by field) as a
    reader gets them back; seconds that encoding (compression included) and decoding took, on one thread each.
    ``interval`` is the 90 % interval of the bytes per position of the whole corpus; None for a single sequence.
    """

    bytes_by_field: dict[str, float]
    targets: Targets
    states: dict[str, NDArray[np.float32]]
    encode_s: float
    decode_s: float
    interval: tuple[float, float] | None = None

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
    sizes = {name: size / sample.num_positions for name, size in totals.num_bytes.items()}
    return Stored(
        sizes,
        Targets.concatenate(totals.targets),
        {name: np.concatenate(parts) for name, parts in totals.states.items()},
        totals.encode_s,
        totals.decode_s,
        _interval(sum(sizes.values()), sample, plan, targets, states_PD),
    )


def _interval(
    bytes_per_token: float, sample: Sample, plan: Plan, targets: Targets, states_PD: NDArray[np.float32] | None
) -> tuple[float, float] | None:
    """Return the 90 % interval of the bytes per position, for sequences drawn from the corpus."""
    count, num_groups = sample.num_positions, min(_GROUPS, len(sample.sequences))
    if num_groups < 2:
        return None
    if count >= plan.num_positions:
        return bytes_per_token, bytes_per_token
    # In any order: the sequences of a group must not be neighbours, nor be spread evenly.
    order = np.random.default_rng(0).permutation(len(sample.sequences))

    def groups(number: int) -> NDArray[np.float64]:
        parts = [sample.part(np.sort(members)) for members in np.array_split(order, number)]
        states = [None if states_PD is None else states_PD[rows] for _, rows in parts]
        sizes = [
            _encoded_bytes(part, plan, targets.take(rows), own) for (part, rows), own in zip(parts, states, strict=True)
        ]
        return np.array([[size, part.num_positions] for size, (part, _) in zip(sizes, parts, strict=True)], float)

    sizes_G, counts_G = groups(num_groups).T
    residuals_G = sizes_G - sizes_G.sum() / count * counts_G
    error = math.sqrt(num_groups / (num_groups - 1) * float((residuals_G**2).sum())) / count
    change = float(_encoded_bytes(sample, plan, targets, states_PD) - groups(2)[:, 0].sum()) / count
    missing = 1 - count / plan.num_positions
    half_width = _T[num_groups - 2] * error * math.sqrt(missing)
    low, high = sorted((0.0, _DOUBLINGS * change * missing))
    return bytes_per_token + low - half_width, bytes_per_token + high + half_width


def _encoded_bytes(sample: Sample, plan: Plan, targets: Targets, states_PD: NDArray[np.float32] | None) -> float:
    """Return the bytes of ``sample`` in a cache, without those that a shard has once."""
    size = 0
    for data in _shards(sample, plan, targets, states_PD):
        for record in plan.fields:
            arrays, packed = _encode(field_of(record, plan), data)
            size += len(packed) - len(pack(_single(arrays)))
        table = with_statistics(data)
        size += len(layout.table_to_ipc(table)) - len(layout.table_to_ipc(table.slice(0, 1)))
    return size


def _single(arrays: Arrays) -> Arrays:
    """Return arrays of one row, with what a shard has once."""
    return {path: values if path.startswith("table/") else values[:1] for path, values in arrays.items()}


def _store_field(field: FieldKind, data: ShardData, plan: Plan, totals: _Totals) -> None:
    (arrays, packed), seconds = best_of_two(partial(_encode, field, data))
    totals.encode_s += seconds
    _add(totals, field.name, len(packed), len(pack(_single(arrays))), data, plan)
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
