"""The interface of a source of documents, which every file format implements.

A reader is opened once and then asked for ranges of rows. It does not hold the texts: files are read in place, and HF
datasets memory-maps those of the hub. So a corpus may be larger than memory, but not a single document, which is read
and tokenised whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import pyarrow as pa

from kdcache.errors import CorpusError

#: Metadata key of a field for the names of its classes, a JSON list.
CLASS_NAMES = b"class_names"


class NamedClass(int):
    """A class number from a column that names its classes; ``names`` are those of all classes."""

    names: tuple[str, ...]

    def __new__(cls, number: int, names: tuple[str, ...]) -> NamedClass:
        """Return the class ``number`` of ``names``."""
        value = super().__new__(cls, number)
        value.names = names
        return value


class Reader(Protocol):
    """Rows of one file or of one hub data set; ``name`` is its name in messages."""

    name: str
    num_rows: int
    #: True if the source is one document, whose id then needs no row number.
    is_single: bool

    @property
    def metadata_schema(self) -> pa.Schema:
        """Columns other than the text, with the types of the source; columns of classes have `CLASS_NAMES`."""
        ...

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``; null texts are empty."""
        ...

    def num_missing(self, stop: int) -> int:
        """Return how many of the first ``stop`` rows have a null or missing text, without reading texts."""
        ...

    def metadata(self, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Return the columns ``names`` of `metadata_schema` for the sorted ``rows``."""
        ...

    def values(self, rows: Sequence[int], names: Sequence[str]) -> list[list[Any]]:
        """Return the values of each of the columns ``names`` for the sorted ``rows``, as the source has them."""
        ...


def no_columns(num_rows: int) -> pa.Table:
    """Return a table of ``num_rows`` rows without columns."""
    return pa.table({"row": pa.nulls(num_rows)}).select([])


def values_of(column: pa.ChunkedArray, field: pa.Field) -> list[Any]:
    """Return the values of a column; JSON in a column of the extension type of that name is parsed."""
    names = tuple(json.loads((field.metadata or {}).get(CLASS_NAMES, b"[]")))
    return [_plain(value, field.type, names) for value in column.to_pylist()]


def _plain(value: Any, kind: pa.DataType, names: tuple[str, ...]) -> Any:
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_plain(item, kind.value_type, names) for item in value]
    if names and isinstance(value, int):
        return NamedClass(value, names)
    return json.loads(value) if isinstance(value, str) and "arrow.json" in str(kind) else value


def is_valid(column: pa.ChunkedArray) -> bool:
    """Whether all strings of ``column`` are UTF-8; Arrow and Parquet files do not promise it."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def checked_texts(name: str, text_field: str, column: pa.ChunkedArray, rows: Sequence[int]) -> list[str]:
    """Return the texts in ``column``, those of ``rows`` of the source ``name``; null texts are empty."""
    try:
        return [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        row = next(row for n, row in enumerate(rows) if not is_valid(column[n : n + 1]))
        raise CorpusError(
            f"{name}, row {row}: field {text_field!r} is not UTF-8; convert it, e.g. with iconv -t utf-8"
        ) from None


def checked_columns(name: str, table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Return ``table``, that of ``rows`` of the source ``name``, if its strings are UTF-8."""
    for column in table.column_names:
        if not is_valid(table[column]):
            raise CorpusError(f"{name}, rows {min(rows)} to {max(rows)}: field {column!r} is not UTF-8")
    return table
