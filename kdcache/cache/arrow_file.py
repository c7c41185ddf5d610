"""Arrow files from strangers: how much they decode to, before they are decoded, and whether they may be used, after.

Arrow's own reader believes what a file says. Compressed buffers say how long they are, offsets of texts say where they
lie, indices of dictionaries what they mean; none of it is checked unless asked for, and a wrong offset reads memory
that belongs to something else, or ends the process. So the sizes in the headers are added up first (`decoded_size`,
which needs a few members of Arrow's FlatBuffers records), and every column is validated in full before use.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

_MAGIC = b"ARROW1"
#: Kinds of messages.
_DICTIONARY, _RECORDS = 2, 3
#: What a row of a column takes at least, once it is a value.
_VALUE_BYTES = 8


class DecodedSize(NamedTuple):
    """Rows of an Arrow file, and bytes of its buffers and values once it is decoded."""

    num_rows: int
    num_bytes: int


def decoded_size(data: memoryview) -> DecodedSize:
    """Return how large the table in an Arrow file is, from its headers alone; raises ``ValueError`` for others."""
    try:
        return _decoded_size(data)
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"its headers lead out of the file ({error})") from None


def _decoded_size(data: memoryview) -> DecodedSize:
    if bytes(data[:6]) != _MAGIC or bytes(data[-6:]) != _MAGIC:
        raise ValueError("it does not begin and end as Arrow files do")
    (footer_bytes,) = struct.unpack_from("<i", data, len(data) - 10)
    start = len(data) - 10 - footer_bytes
    if footer_bytes < 8 or start < 0:
        raise ValueError(f"a footer of {footer_bytes} bytes")
    footer = _Record.root(data[start : len(data) - 10])
    num_rows = num_bytes = 0
    for member, kind in ((2, _DICTIONARY), (3, _RECORDS)):
        for offset, header_bytes, _ in footer.structs(member, "<qi4xq"):
            rows, size = _batch_size(data, offset, header_bytes, kind)
            num_rows += rows if kind == _RECORDS else 0
            num_bytes += size
    return DecodedSize(num_rows, num_bytes)


def _batch_size(data: memoryview, offset: int, header_bytes: int, kind: int) -> tuple[int, int]:
    """Return the rows of a batch and its bytes once it is decoded."""
    if offset < 0 or header_bytes < 8 or offset + header_bytes > len(data):
        raise ValueError("a batch lies outside the file")
    header = data[offset : offset + header_bytes]
    message = _Record.root(header[8 if struct.unpack_from("<I", header)[0] == 0xFFFFFFFF else 4 :])
    if message.number(1, "<B") != kind:
        raise ValueError("a batch is of another kind than the footer says")
    batch = message.record(2)
    if kind == _DICTIONARY:
        batch = batch.record(1)
    is_compressed = batch.has(3)
    nodes = np.array(list(batch.structs(1, "<qq")), dtype=np.int64).reshape(-1, 2)
    buffers = list(batch.structs(2, "<qq"))
    num_rows = batch.number(0, "<q")
    if num_rows < 0 or (nodes < 0).any() or any(begin < 0 or size < 0 for begin, size in buffers):
        raise ValueError("a negative length")
    num_bytes = _VALUE_BYTES * sum(nodes[:, 0].tolist())
    for begin, size in buffers:
        start = offset + header_bytes + begin
        if start + size > len(data):
            raise ValueError("a buffer lies outside the file")
        decoded = struct.unpack_from("<q", data, start)[0] if is_compressed and size else -1
        if decoded < -1:
            raise ValueError("a buffer of a negative length")
        num_bytes += size if decoded == -1 else decoded
    return num_rows, num_bytes


class _Record:
    """A table of a FlatBuffers record: members by number, each perhaps missing."""

    def __init__(self, data: memoryview, place: int) -> None:
        self._data, self._place = data, place
        self._members = place - self._read("<i", place)
        if place < 0 or self._members < 0:
            raise ValueError("a record lies outside the file")
        self._num_bytes = self._read("<H", self._members)

    @classmethod
    def root(cls, data: memoryview) -> _Record:
        """Return the record that ``data`` begin with."""
        return cls(data, struct.unpack_from("<I", data)[0])

    def has(self, member: int) -> bool:
        """Return whether a member is there."""
        return self._at(member) is not None

    def number(self, member: int, kind: str) -> int:
        """Return a number, 0 where it is missing."""
        place = self._at(member)
        return 0 if place is None else int(self._read(kind, place))

    def record(self, member: int) -> _Record:
        """Return a record inside this one."""
        place = self._at(member)
        if place is None:
            raise ValueError("a record lacks what it must have")
        return _Record(self._data, place + self._read("<I", place))

    def structs(self, member: int, kind: str) -> Iterator[tuple[int, ...]]:
        """Yield the items of a vector of structs."""
        place = self._at(member)
        if place is None:
            return iter(())
        start = place + self._read("<I", place)
        count, size = self._read("<I", start), struct.calcsize(kind)
        if start + 4 + count * size > len(self._data):
            raise ValueError("a list lies outside the file")
        return struct.iter_unpack(kind, self._data[start + 4 : start + 4 + count * size])

    def _at(self, member: int) -> int | None:
        entry = 4 + 2 * member
        offset = self._read("<H", self._members + entry) if entry < self._num_bytes else 0
        return self._place + offset if offset else None

    def _read(self, kind: str, place: int) -> int:
        if place < 0:  # Python would count from the end
            raise IndexError("a negative place")
        value: int = struct.unpack_from(kind, self._data, place)[0]
        return value


def refused_type(kind: pa.DataType) -> str | None:
    """Return why a column of this type is refused, None where it is not.

    Metadata of a corpus may be of any type that data sets have. Unions and run-end-encoded columns, of which a few
    bytes make any number of rows, are none.
    """
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return refused_type(kind.storage_type)
    if types.is_union(kind) or types.is_run_end_encoded(kind):
        return f"the type {kind}"
    if types.is_dictionary(kind):
        return "a dictionary of nested values" if types.is_nested(kind.value_type) else refused_type(kind.value_type)
    if types.is_nested(kind):
        for number in range(kind.num_fields):
            inner = kind.field(number).type
            if types.is_dictionary(inner):
                return "a dictionary inside nested values"
            found = refused_type(inner)
            if found:
                return found
    return None


def expanded_bytes(column: pa.ChunkedArray) -> int:
    """Return the bytes of the texts of a dictionary-encoded column once each row has its own; 0 for other columns."""
    kind = column.type
    if not pa.types.is_dictionary(kind) or not _has_lengths(kind.value_type):
        return 0
    import pyarrow.compute as pc  # takes 40 ms, and most tables have no such column

    total = 0
    for chunk in column.chunks:
        lengths = pc.fill_null(pc.binary_length(chunk.dictionary), 0)
        total += pc.sum(pc.take(lengths, chunk.indices), min_count=0).cast(pa.int64()).as_py()
    return total


def _has_lengths(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


#: What a column must be, by its word in errors.
_KINDS = {
    "whole numbers": pa.types.is_integer,
    "numbers": pa.types.is_floating,
    "texts": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
}
_WHOLE, _TEXTS = ("whole numbers", False), ("texts", False)
#: By column of a per-sequence table: what it holds, and whether values may be missing. Others are of the corpus.
SEQUENCE_COLUMNS: dict[str, tuple[str, bool]] = {
    "sequence": _WHOLE,
    "sequence_id": _TEXTS,
    "document_id": _TEXTS,
    "num_documents": _WHOLE,
    "token_offset": _WHOLE,
    "num_tokens": _WHOLE,
    "num_positions": _WHOLE,
    "token_hash": _TEXTS,
    "num_targets": _WHOLE,
    "teacher_loss": ("numbers", True),
    "teacher_entropy": ("numbers", True),
    "kept_mass": ("numbers", True),
}
#: The same of plan.parquet.
PLAN_COLUMNS: dict[str, tuple[str, bool]] = {
    "sequence": _WHOLE,
    "sequence_id": _TEXTS,
    "document": _WHOLE,
    "document_id": _TEXTS,
    "token_offset": _WHOLE,
    "num_tokens": _WHOLE,
    "shard": _WHOLE,
}


def check_schema(schema: pa.Schema, known: dict[str, tuple[str, bool]]) -> None:
    """Raise ``ValueError`` for a column that is there twice, of a type that is refused, or not what is ``known``."""
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise ValueError(f"the column {twice!r} appears twice")
    for field in schema:
        refused = refused_type(field.type)
        if refused:
            raise ValueError(f"the column {field.name!r} has {refused}, which tables of a cache do not have")
        words, may_be_missing = known.get(field.name, ("", True))
        if words and not (_KINDS[words](field.type) or (may_be_missing and pa.types.is_null(field.type))):
            raise ValueError(f"the column {field.name!r} has the type {field.type}, expected {words}")


def check_values(table: pa.Table, known: dict[str, tuple[str, bool]]) -> None:
    """Raise ``ValueError`` unless all buffers, offsets and indices of ``table`` are sound, and known values there."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"the column {name!r}: {error}") from None
        words, may_be_missing = known.get(name, ("", True))
        if column.null_count and not may_be_missing:
            raise ValueError(f"the column {name!r} has no value in row {column.to_pylist().index(None)}")
        if words == "numbers" and pa.types.is_floating(column.type):
            is_nan = np.isnan(column.to_numpy())
            if column.null_count:  # a missing value is no number either
                is_nan &= np.asarray(column.is_valid())
            if is_nan.any():
                raise ValueError(f"the column {name!r} is not a number in row {int(is_nan.argmax())}")
