"""The base of all field kinds.

A field is stored as arrays. The first axis of an array counts ``sequences``, ``tokens``, ``positions`` or entries of an
axis that the kind defines; a ``table`` exists once per shard. In memory a field has three forms:

- *staged*: small rows as they come from the teacher, collected until their shard is complete;
- *encoded*: the arrays of one shard, as they are stored;
- *decoded*: the value that users of a batch see.

Encoding sees a whole shard, so that codecs may choose scales and tables for it. Decoding gets any rows, often
from several shards. `FieldKind.open` therefore gives every array one row per token or position first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import CacheError
from kdcache.schema import ArrayRecord, FieldRecord, Plan, SequenceBatch

Arrays = Mapping[str, NDArray[Any]]


class FieldKind(ABC):
    """One field of one plan. A subclass defines a kind and overrides what differs from one plain array per position."""

    is_always_read: ClassVar[bool] = False
    """Whether every batch includes the field, even if it is not requested."""

    id_tables: tuple[str, ...] = ()
    """Tables of ids that `decode` also takes as `OpenTables`: rows of several shards are then decoded together."""

    def __init__(self, record: FieldRecord, plan: Plan) -> None:
        self.record = record
        self.plan = plan
        self.name = record.name

    @property
    def axis(self) -> str:
        """What the rows of a decoded value are: ``positions`` or ``tokens``."""
        return "positions"

    # ------------------------------------------------------------------------------------------------ what is stored

    @abstractmethod
    def arrays(self) -> tuple[ArrayRecord, ...]:
        """Describe the arrays of the field; a manifest that lists others is rejected."""

    @classmethod
    def most_rows(cls, plan: Plan, num_positions: int) -> dict[str, int]:
        """Return the largest number of rows that a shard of ``num_positions`` may have on each axis of the kind's own.

        A manifest may be untrusted. This limit bounds the memory that a reader allocates.
        """
        return {}

    def opened_bytes(self, num_rows: Mapping[str, int]) -> int:
        """Return the bytes that the arrays of a shard take in memory, tables left out, from its ``num_rows``."""
        arrays = (array for array in self.record.arrays if array.rows != "table")
        return sum(num_rows.get(a.rows, 0) * prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)

    # ------------------------------------------------------------------------------------------------ writing a shard

    def stage(self, value: Any) -> Any:
        """Convert the rows of a batch, as decoded or as received from the teacher, to the staged form."""
        return value

    def allocate(self, staged: Any, num_rows: int) -> Any:
        """Return room for ``num_rows`` staged rows like ``staged``."""
        return np.zeros((num_rows, *staged.shape[1:]), staged.dtype)

    def put(self, room: Any, rows: NDArray[np.int64] | slice, staged: Any) -> None:
        """Write ``staged`` to ``rows`` of what `allocate` returned."""
        room[rows] = staged

    @abstractmethod
    def encode(self, staged: Any) -> dict[str, NDArray[Any]]:
        """Return the arrays of a shard, by name, from all of its rows."""

    # ---------------------------------------------------------------------------------------------------- reading rows

    def open(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return the arrays of a shard with one row per token or position, still encoded.

        Arrays over an axis of the kind's own become rectangles here. What can be checked at little cost is checked
        here, once for a shard: whatever the numbers are, `decode` must not give ids out of range, or NaN. Raises
        ``CorruptCacheError``.
        """
        return dict(arrays)

    @abstractmethod
    def decode(self, arrays: Mapping[str, Any]) -> Any:
        """Return the value of any rows: slices of what `open` returned, with the whole of every table.

        Raises ``CorruptCacheError``.
        """

    @classmethod
    def concatenate(cls, values: Sequence[Any]) -> Any:
        """Return several decoded values as one, in this order."""
        return np.concatenate(values)

    # --------------------------------------------------------------------------------------------------- using a batch

    def check(self, batch: SequenceBatch) -> Iterator[str]:
        """Yield what makes no sense in the field's value of ``batch``, for ``verify --deep``."""
        yield from ()

    @classmethod
    def collate(cls, name: str, batch: SequenceBatch) -> dict[str, NDArray[Any]]:
        """Return the arrays that a training batch gets of the field called ``name``."""
        return {name: batch.fields[name]}

    def columns(self, name: str, batch: SequenceBatch) -> dict[str, pa.Array]:
        """Return Arrow columns with one list per sequence for the field called ``name``."""
        offsets = batch.token_offsets_N1 if self.axis == "tokens" else batch.position_offsets_N1
        return {name: lists(batch.fields[name], offsets)}

    # ----------------------------------------------------------------------------------------------------- transcoding

    def transcoded(self, settings: Any, sample: Any) -> FieldRecord:
        """Return the record of the field in a transcoding; by default nothing of it changes.

        ``settings`` are those that the user gave for the field (None or empty: none), ``sample`` is a decoded value of
        some rows. The rows of a transcoding are decoded, staged and encoded again.
        """
        if settings:
            raise CacheError(f"field {self.name} (kind {self.record.kind}) cannot be changed by a transcoding")
        return self.record


def lists(values: NDArray[Any] | pa.Array, offsets: NDArray[np.int64] | Sequence[int]) -> pa.Array:
    """Return rows of ``values`` as lists that end at ``offsets``; further axes become lists of fixed size."""
    if isinstance(values, np.ndarray):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        for size in reversed(values.shape[1:]):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
        values = flat
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
