"""Parquet files, read in place by pyarrow: a few rows at a time, forwards, and only the columns that are asked for.

A row group may hold a whole file, so none is decoded at once. Readers go forwards, and jump to the row group of the row
that is wanted next. Columns keep their types; where a type cannot be stored in a table of sequences (maps, say), the
column becomes JSON texts.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.corpus.column_types import MIXED, as_text
from kdcache.corpus.file_bytes import FileBytes
from kdcache.corpus.readers import CLASS_NAMES, checked_columns, checked_texts, is_valid, no_columns, values_of
from kdcache.corpus.record_file import no_text_field
from kdcache.errors import CorpusError

#: Decoded bytes of one step forwards, by the average size of a row.
_STEP_BYTES = 8 << 20
_MOST_ROWS = 1024


class ParquetReader:
    """Rows of a Parquet file whose ``text_field`` is a string column.

    Raises ``CorpusError`` for a file that cannot be read, without such a column, or with two columns of one name.
    """

    is_single = False

    def __init__(self, path: Path, text_field: str) -> None:
        self.name = str(path)
        self._data = FileBytes.of(path)
        self._text_field = text_field
        import pyarrow.parquet as pq  # takes 40 ms, and every command knows the tasks, which know this module

        try:
            with pq.ParquetFile(path) as file:
                self._footer, schema = file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CorpusError(f"cannot read {path} as parquet: {_first_line(error)}") from None
        repeated = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if repeated is not None:
            raise CorpusError(f"{path} has two columns called {repeated!r}; give them different names")
        self.num_rows = self._footer.num_rows
        counts = [self._footer.row_group(group).num_rows for group in range(self._footer.num_row_groups)]
        self._group_starts_G1 = np.cumsum([0, *counts])
        self._streams: dict[tuple[str, ...], _Stream] = {}
        if self.num_rows and text_field not in schema.names:
            raise no_text_field(self.name, text_field, schema.names)
        columns = [field for field in schema if field.name != text_field]
        self._as_text = {field.name for field in columns if not _is_plain(field.type)}
        names = _class_names(schema)
        self.metadata_schema = pa.schema([self._field(field, names.get(field.name)) for field in columns])
        if self.num_rows:
            self._check_text(schema.field(text_field).type)

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``; null texts are empty."""
        if start >= stop:
            return []
        rows = range(start, stop)
        column = self._read(rows, (self._text_field,))[self._text_field]
        return checked_texts(self.name, self._text_field, _without_dictionary(column), rows)

    def num_missing(self, stop: int) -> int:
        """Return how many of the first ``stop`` rows have null for a text."""
        num_missing, at = 0, 0
        for group in range(self._footer.num_row_groups):
            end = int(self._group_starts_G1[group + 1])
            known = self._null_count(group)
            if end <= stop and known is not None:
                num_missing += known
            elif at < stop:
                with _Stream(self._data, (self._text_field,), [group], self._step(group)) as stream:
                    for batch in stream.batches:
                        num_missing += batch.column(0).slice(0, max(stop - at, 0)).null_count
                        at += batch.num_rows
            at = end
        return num_missing

    def metadata(self, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Return the columns ``names`` for the sorted ``rows``."""
        if not names:
            return no_columns(len(rows))
        table = self._read(rows, tuple(names))
        columns = [self._column(table[name], self.metadata_schema.field(name)) for name in names]
        return checked_columns(self.name, pa.table(columns, names=list(names)), rows)

    def values(self, rows: Sequence[int], names: Sequence[str]) -> list[list[Any]]:
        """Return the values of each of the columns ``names`` for the sorted ``rows``."""
        table = self._read(rows, tuple(names))
        for name in names:
            if not is_valid(table[name]):
                raise CorpusError(f"{self.name}, rows {min(rows)} to {max(rows)}: field {name!r} is not UTF-8")
        return [values_of(_without_dictionary(table[name]), self.metadata_schema.field(name)) for name in names]

    def _field(self, field: pa.Field, names: list[str] | None) -> pa.Field:
        if field.name in self._as_text:
            return pa.field(field.name, MIXED)
        kind = _with_usual_names(field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
        kept = {} if names is None else {CLASS_NAMES: json.dumps(names)}
        return pa.field(field.name, kind).with_metadata(kept)

    def _column(self, column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
        if field.name in self._as_text:
            return pa.chunked_array([[_map_as_text(value) for value in column.to_pylist()]], field.type)
        column = _without_dictionary(column)
        return column if column.type == field.type else column.cast(field.type)

    def _check_text(self, kind: pa.DataType) -> None:
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if _is_string(value) or pa.types.is_null(value):
            return
        with _Stream(self._data, (self._text_field,), None, 1024) as stream:
            row = 0
            for batch in stream.batches:
                valid = np.asarray(batch.column(0).is_valid())
                if valid.any():
                    row += int(valid.argmax())
                    break
                row += batch.num_rows
        raise CorpusError(
            f"{self.name}, row {min(row, self.num_rows - 1)}: field {self._text_field!r} must be a string, "
            f"found {kind}; choose with --text-field"
        )

    def _null_count(self, group: int) -> int | None:
        """Return the number of null texts of a row group from its statistics, None if they do not tell."""
        found = self._footer.row_group(group)
        for index in range(found.num_columns):
            column = found.column(index)
            if column.path_in_schema == self._text_field:
                statistics = column.statistics
                return statistics.null_count if statistics is not None and statistics.has_null_count else None
        return None

    def _step(self, group: int) -> int:
        found = self._footer.row_group(group)
        return max(1, min(_MOST_ROWS, _STEP_BYTES * found.num_rows // max(found.total_byte_size, 1)))

    def _read(self, rows: Sequence[int], names: tuple[str, ...]) -> pa.Table:
        """Return columns for sorted ``rows``, batch by batch."""
        parts, at = [], 0
        try:
            while at < len(rows):
                first, batch = self._batch_with(rows[at], names)
                end = bisect.bisect_left(rows, first + batch.num_rows, at)
                wanted = rows[at:end]
                is_range = wanted[-1] + 1 - wanted[0] == len(wanted)
                part = batch.slice(wanted[0] - first, len(wanted)) if is_range else None
                parts.append(batch.take(pa.array([row - first for row in wanted])) if part is None else part)
                at = end
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CorpusError(f"cannot read {self.name} as parquet: {_first_line(error)}") from None
        if rows[-1] + 1 == self.num_rows:
            self._streams.pop(names).close()  # a directory may hold a hundred thousand files
        return pa.Table.from_batches(parts)

    def _batch_with(self, row: int, names: tuple[str, ...]) -> tuple[int, pa.RecordBatch]:
        """Return the batch that holds ``row`` and the number of its first row."""
        group = bisect.bisect_right(self._group_starts_G1, row) - 1
        stream = self._streams.get(names)
        if stream is None or row < stream.first or stream.group < group:
            if stream is not None:
                stream.close()
            groups = list(range(group, self._footer.num_row_groups))
            stream = self._streams[names] = _Stream(self._data, names, groups, self._step(group))
            stream.first = int(self._group_starts_G1[group])
        while stream.batch is None or stream.first + stream.batch.num_rows <= row:
            if stream.batch is not None:
                stream.first += stream.batch.num_rows
            stream.batch = next(stream.batches)
        stream.group = bisect.bisect_right(self._group_starts_G1, stream.first + stream.batch.num_rows - 1) - 1
        return stream.first, stream.batch


class _Stream:
    """Columns of some row groups of a file (None: all), in batches; ``batch`` begins at row ``first`` of the file."""

    def __init__(self, data: FileBytes, names: tuple[str, ...], groups: list[int] | None, step: int) -> None:
        import pyarrow.parquet as pq

        with data.opened():  # the file that was found first
            assert data.path is not None
            self._file = pq.ParquetFile(data.path, buffer_size=1 << 20)
        found = self._file.iter_batches(step, row_groups=groups, columns=list(names))
        self.batches: Iterator[pa.RecordBatch] = (batch.select(list(names)) for batch in found)
        self.batch: pa.RecordBatch | None = None
        self.first = self.group = 0

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_string(kind: pa.DataType) -> bool:
    views = getattr(pa.types, "is_string_view", lambda _: False)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or bool(views(kind))


def _is_plain(kind: pa.DataType) -> bool:
    """Whether columns of this type can be stored, joined and read by every version of pyarrow that kdcache takes."""
    types = pa.types
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return not types.is_dictionary(kind.value_type) and _is_plain(kind.value_type)
    if types.is_struct(kind):
        return kind.num_fields > 0 and all(
            _is_plain(field.type) and not types.is_dictionary(field.type) for field in kind
        )
    return (
        types.is_primitive(kind)
        or types.is_null(kind)
        or types.is_boolean(kind)
        or types.is_decimal(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
    )


def _with_usual_names(kind: pa.DataType) -> pa.DataType:
    """Return a type of lists as pyarrow names it, whatever the writer of the file called the items."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_usual_names(field.type)) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_with_usual_names(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_with_usual_names(kind.value_type))
    return pa.list_(_with_usual_names(kind.value_type)) if pa.types.is_list(kind) else kind


def _without_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _map_as_text(value: Any) -> str | None:
    """Return a value as JSON; the pairs of a map become an object if they can."""
    is_map = isinstance(value, list) and all(isinstance(item, tuple) and len(item) == 2 for item in value)
    if is_map and value and len({str(key) for key, _ in value}) == len(value):
        return as_text({str(key): item for key, item in value})
    return as_text(value)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of classes by column, as HF datasets notes them in files that it writes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {name: _of_items(feature) for name, feature in features.items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
    return {name: feature["names"] for name, feature in found.items() if isinstance(feature.get("names"), list)}


def _of_items(feature: Any) -> dict[str, Any]:
    """Return the description of a column, or of the items of one of lists."""
    inner = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
    return inner if isinstance(inner, dict) else {}


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
