"""The one place where a shard is put together: its sequences and the rows of every field, batch by batch in any order.

Dumps fill it from the teacher, transcodings from another cache, estimates from a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache.shard_data import ShardData
from kdcache.cache.tail_prior import TailSum
from kdcache.errors import CacheError
from kdcache.fields import FieldKind, TokenRows
from kdcache.schema import Sequence as TokenSequence

Sequences = Sequence[TokenSequence]


class ShardBuilder:
    """Collects what shard ``index`` holds; ``fields`` are those whose rows `put` is given, by name."""

    def __init__(self, index: int, fields: Mapping[str, FieldKind]) -> None:
        self._index, self._fields = index, fields
        self._sequences: dict[int, TokenSequence] = {}
        self._parts: dict[str, list[tuple[list[int], Any]]] = {}

    def put(self, numbers: Sequence[int], sequences: Sequences, staged: Mapping[str, Any]) -> None:
        """Add some sequences, numbered from 0 in the shard, and their rows.

        ``staged`` are values of fields by name, as `FieldKind.stage` returned them, with the rows of ``sequences`` one
        after another.
        """
        order = [int(number) for number in numbers]
        self._sequences.update(zip(order, sequences, strict=True))
        for name, values in staged.items():
            self._parts.setdefault(name, []).append((order, values))

    def build(
        self,
        table: pa.Table,
        stored_labels: Callable[[list[TokenSequence]], NDArray[Any]],
        *,
        tail_sum: TailSum | None = None,
        copied: Mapping[str, dict[str, NDArray[Any]]] | None = None,
    ) -> ShardData:
        """Return the shard, which is complete.

        ``table`` has a row for each sequence, ``stored_labels`` is the task's, ``copied`` are fields that come encoded
        from another cache. Raises ``CacheError`` when sequences are missing.
        """
        members = [self._sequences[number] for number in sorted(self._sequences)]
        if sorted(self._sequences) != list(range(table.num_rows)):
            raise CacheError(
                f"shard {self._index} has {len(members)} of its {table.num_rows} sequences; put the others before build"
            )
        tokens = TokenRows.of(members, stored_labels(members))
        counts = {"tokens": tokens.num_tokens_N, "positions": tokens.num_positions_N}
        offsets = {axis: np.concatenate([[0], np.cumsum(np.asarray(count_N))]) for axis, count_N in counts.items()}
        values = {name: self._join(name, offsets[self._fields[name].axis]) for name in list(self._parts)}
        return ShardData(self._index, tokens, values, table, dict(copied or {}), tail_sum)

    def _join(self, name: str, offsets_N1: NDArray[np.int64]) -> Any:
        """Return the rows of a field in the order of the shard."""
        field, parts = self._fields[name], self._parts.pop(name)
        if len(parts) == 1 and parts[0][0] == list(range(len(offsets_N1) - 1)):
            return parts[0][1]
        room = field.allocate(parts[0][1], int(offsets_N1[-1]))
        # Each part is freed as soon as it was copied: a shard of hidden states fits in memory once, not twice.
        while parts:
            numbers, values = parts.pop()
            field.put(room, _rows_of(offsets_N1, numbers), values)
        return room


def _rows_of(offsets_N1: NDArray[np.int64], numbers: list[int]) -> NDArray[np.int64] | slice:
    """Return the rows of some sequences; neighbours in order are one slice."""
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(int(offsets_N1[numbers[0]]), int(offsets_N1[numbers[-1] + 1]))
    return np.concatenate([np.arange(offsets_N1[n], offsets_N1[n + 1]) for n in numbers])
