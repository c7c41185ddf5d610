"""Rows of files in which one record follows another (JSON lines, CSV): an offset for each row, parsed when asked for.

A file is read once when it is opened: every row is checked, so that a mistake is named with its line before anything
else runs, and the types of its columns are found. What stays in memory are 8 bytes per row. Rows are parsed again, one
after another, when their texts or columns are wanted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from kdcache.corpus.column_types import MIXED, ColumnType, as_text
from kdcache.corpus.file_bytes import FileBytes
from kdcache.corpus.readers import no_columns
from kdcache.errors import CorpusError, did_you_mean

#: Rows of so many bytes together are kept when they are parsed: most are asked for twice, for text and for columns.
_KEPT_BYTES = 8 << 20


class Record(NamedTuple):
    """A row as it was found: ``place`` says where, such as ``line 3``; ``start`` and ``stop`` are offsets."""

    place: str
    start: int
    stop: int
    values: dict[str, Any]


class RecordFile:
    """Rows of the file ``data``, which ``records`` finds and ``parse`` parses again.

    Raises ``CorpusError`` for a text that is no string, for strings that are no Unicode, and where no row has a text.
    """

    is_single = False

    def __init__(
        self, data: FileBytes, text_field: str, records: Iterable[Record], parse: Callable[[bytes], dict[str, Any]]
    ) -> None:
        self.name = data.name
        self._data, self._text_field, self._parse = data, text_field, parse
        starts, missing, types = array("q"), array("q"), dict[str, ColumnType]()
        stop = data.start
        for record in records:
            self._look_at(record, len(starts), types, missing)
            starts.append(record.start)
            stop = record.stop
        self.num_rows = len(starts)
        self._starts_N1 = np.array([*starts, stop], np.int64)
        self._missing = np.array(missing, np.int64)
        if self.num_rows and text_field not in types:
            raise no_text_field(self.name, text_field, list(types))
        types.pop(text_field, None)
        found = {name: found.arrow() for name, found in types.items()}
        self._mixed = {name for name, kind in found.items() if kind is None}
        self.metadata_schema = pa.schema([(name, MIXED if kind is None else kind) for name, kind in found.items()])
        self._kept: tuple[int, list[dict[str, Any]]] = (0, [])

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``; null texts are empty."""
        return [row.get(self._text_field) or "" for row in self._rows(range(start, stop))]

    def num_missing(self, stop: int) -> int:
        """Return how many of the first ``stop`` rows have null for a text, or no such field."""
        return int(np.searchsorted(self._missing, stop))

    def metadata(self, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Return the columns ``names`` for the sorted ``rows``."""
        if not names:
            return no_columns(len(rows))
        columns = self._columns(rows, names)
        schema = pa.schema([self.metadata_schema.field(name) for name in names])
        kinds = dict(zip(schema.names, schema.types, strict=True))
        arrays = [
            pa.array([as_text(value) for value in columns[name]] if name in self._mixed else columns[name], kinds[name])
            for name in names
        ]
        return pa.table(arrays, schema=schema)

    def values(self, rows: Sequence[int], names: Sequence[str]) -> list[list[Any]]:
        """Return the values of the columns ``names`` for the sorted ``rows``; those of mixed columns as they are."""
        columns = self._columns(rows, names)
        schema = self.metadata_schema
        return [
            columns[name] if name in self._mixed else pa.array(columns[name], schema.field(name).type).to_pylist()
            for name in names
        ]

    def _columns(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for row in self._rows(rows):
            for name, column in columns.items():
                column.append(row.get(name))
        return columns

    def _rows(self, rows: Sequence[int]) -> Iterable[dict[str, Any]]:
        """Parse rows, one at a time."""
        if not rows:
            return
        first, kept = self._kept
        if first <= rows[0] and rows[-1] < first + len(kept):
            yield from (kept[row - first] for row in rows)
            return
        starts = self._starts_N1[rows[0] : rows[-1] + 2].tolist()
        if len(rows) == rows[-1] + 1 - rows[0] and starts[-1] - starts[0] <= _KEPT_BYTES:
            data, at = self._data.read(starts[0], starts[-1]), starts[0]
            spans = zip(rows, starts, starts[1:], strict=False)
            parsed = [self._parsed(row, data[start - at : stop - at]) for row, start, stop in spans]
            self._kept = (rows[0], parsed)
            yield from parsed
            return
        with self._data.opened() as file:
            for row in rows:
                start, stop = starts[row - rows[0]], starts[row - rows[0] + 1]
                file.seek(start)
                yield self._parsed(row, file.read(stop - start))

    def _parsed(self, row: int, data: bytes) -> dict[str, Any]:
        try:
            return self._parse(data)
        except ValueError:
            raise CorpusError(f"{self.name}, row {row} has changed since the corpus was opened") from None

    def _look_at(self, record: Record, row: int, types: dict[str, ColumnType], missing: Any) -> None:
        for name, value in record.values.items():
            if name not in types:
                types[name] = ColumnType()
            types[name].add(value)
        text = record.values.get(self._text_field)
        if text is None:
            missing.append(row)
        elif type(text) is not str:
            raise CorpusError(
                f"{self.name}, {record.place} (row {row}): field {self._text_field!r} must be a string, "
                f"found {kind_of(text)}; choose with --text-field"
            )


class NoTextFieldError(CorpusError):
    """A source has no column of texts."""


def no_text_field(name: str, text_field: str, columns: Sequence[str]) -> NoTextFieldError:
    """Return the error for a source without the column of the texts."""
    hint = did_you_mean(text_field, columns)
    listed = f" columns: {', '.join(columns)}" if hint.endswith("?") else ""
    return NoTextFieldError(f"{name} has no field {text_field!r}; {hint}{listed}; choose with --text-field")


def kind_of(value: Any) -> str:
    """Return what a value of JSON is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value}")
