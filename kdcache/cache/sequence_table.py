"""The per-sequence table of a cache, read column by column: each column at most once while the cache is open.

A table of ten million sequences with metadata takes gigabytes, and most callers want one column of numbers: the lengths
for batching, the teacher's loss for a curriculum, the columns that a filter names. Every shard stores its part of the
table as an Arrow file, from which single columns can be decoded.

A table may be a stranger's, or damaged: its hash is compared when a shard's table is first read, what it decodes to is
bounded, and columns are validated in full (`kdcache.cache.arrow_file`).

`SequenceTable` has the members of ``pyarrow.Table`` that filters use (``column_names``, ``schema``, ``num_rows``, and
``table[name]``), so a filter works on either.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.cache import arrow_file, layout
from kdcache.cache.columns import as_numpy
from kdcache.cache.limits import check_decoded, decoded_limit
from kdcache.cache.shards import parsed_object
from kdcache.errors import CorruptCacheError, shortened
from kdcache.schema import ShardRecord
from kdcache.storage.folder import Folder

#: Per-sequence tables that are read at the same time from a remote cache.
TABLES_AT_ONCE = 8
#: Shards whose whole tables stay in memory for `SequenceTable.row`.
_ROW_SHARDS = 8
#: Columns whose numbers are counted elsewhere too.
_COUNTED = ("num_tokens", "num_positions", "num_targets")


class SequenceTable:
    """The per-sequence tables of ``shards``, one below the other; safe to use from several threads."""

    def __init__(self, folder: Folder, shards: Sequence[ShardRecord], most_bytes: int | None = None) -> None:
        self.num_rows = sum(shard.num_sequences for shard in shards)
        self._folder, self._shards = folder, shards
        self._most_bytes = decoded_limit(most_bytes)
        self._starts = np.concatenate([[0], np.cumsum([shard.num_sequences for shard in shards], dtype=np.int64)])
        self._hashed: set[int] = set()
        """Shards whose tables have been compared with their hashes."""
        self._schema: pa.Schema | None = None
        self._lacking: dict[str, ShardRecord] = {}
        """The first shard that lacks a column, by column."""
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._rows: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def schema(self) -> pa.Schema:
        """Names and types of all columns; decodes no column."""
        with self._lock:
            if self._schema is None:
                self._load([])
            return self._schema

    @property
    def column_names(self) -> list[str]:
        """Names of all columns."""
        names: list[str] = self.schema.names
        return names

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """Return a column, with nulls for shards that lack it; raises ``KeyError`` for an unknown one."""
        self.load([name])
        return self._columns[name]

    def get(self, name: str) -> pa.ChunkedArray | None:
        """Return a column, None when no shard has it."""
        self.load([name])
        return self._columns.get(name)

    def load(self, names: Iterable[str]) -> None:
        """Read those of the columns that were not read before, in one pass over the shards; ignores unknown ones."""
        with self._lock:
            known = None if self._schema is None else set(self._schema.names)
            wanted = [n for n in dict.fromkeys(names) if n not in self._columns and (known is None or n in known)]
            if wanted:
                self._load(wanted)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the named columns (None: all) as one table.

        Raises ``CorruptCacheError`` when the table of a shard lacks a named column or cannot be read.
        """
        with self._lock:
            self.load(self.column_names if columns is None else columns)
            for name in columns or ():
                if name in self._lacking or name not in self._columns:
                    raise _wrong(self._folder, self._lacking.get(name) or self._shards[0], f"no column {name!r}")
            schema = self.schema
            fields = [schema.field(name) for name in (schema.names if columns is None else columns)]
            arrays = [self._columns[field.name] for field in fields]
            return pa.table(arrays, schema=pa.schema(fields, metadata=schema.metadata))

    def row(self, shard: int, row: int) -> dict[str, Any]:
        """Return a row of the table of ``shard``, with all columns of that table."""
        with self._lock:
            if shard not in self._rows:
                self._rows[shard] = _as_table(*self._read(self._shards[shard], None))
                if len(self._rows) > _ROW_SHARDS:
                    self._rows.popitem(last=False)
            self._rows.move_to_end(shard)
            found: dict[str, Any] = self._rows[shard].slice(row, 1).to_pylist()[0]
            return found

    def clear(self) -> None:
        """Forget everything that was read."""
        with self._lock:
            self._columns.clear()
            self._rows.clear()

    def _load(self, names: list[str]) -> None:
        # Small objects of a remote cache take their time one by one.
        with ThreadPoolExecutor(1 if self._folder.store is None else TABLES_AT_ONCE) as pool:
            found = list(pool.map(lambda shard: self._read(shard, names), self._shards))
        if self._schema is None:
            self._schema = self._unified([schema for schema, _ in found])
        for name in names:
            if name in self._schema.names:
                kind = self._schema.field(name).type
                pieces = [columns.get(name) for _, columns in found]
                self._columns[name] = _stacked(pieces, [shard.num_sequences for shard in self._shards], kind)

    def _read(self, shard: ShardRecord, names: list[str] | None) -> tuple[pa.Schema, dict[str, pa.ChunkedArray]]:
        found = _read_columns(
            self._folder,
            shard,
            names,
            most_bytes=self._most_bytes,
            check_hash=shard.index not in self._hashed,
            first_sequence=int(self._starts[shard.index]),
        )
        self._hashed.add(shard.index)
        return found

    def _unified(self, schemas: list[pa.Schema]) -> pa.Schema:
        """Return the schema of all shards together, and note the columns that some of them lack."""
        try:
            unified = pa.unify_schemas(_with_dictionaries(schemas) or [pa.schema([])], promote_options="default")
        except pa.ArrowException as error:
            raise CorruptCacheError(
                f"{self._folder}, field {layout.SEQUENCES_FIELD}: the tables of the shards differ: {error}"
            ) from None
        for shard, schema in zip(self._shards, schemas, strict=True):
            for name in set(unified.names) - set(schema.names):
                self._lacking.setdefault(name, shard)
        return unified


def _with_dictionaries(schemas: list[pa.Schema]) -> list[pa.Schema]:
    """Return the schemas with dictionaries in all of them for a column that is one in some: it holds the same values.

    A shard in which large values repeat stores each once; the next may hold them as they are.
    """
    types = {field.name: field.type for schema in schemas for field in schema if pa.types.is_dictionary(field.type)}
    if not types:
        return schemas
    return [
        pa.schema(
            [
                field.with_type(types[field.name])
                if field.name in types and field.type == types[field.name].value_type
                else field
                for field in schema
            ],
            metadata=schema.metadata,
        )
        for schema in schemas
    ]


def load_table(
    folder: Folder,
    shard: ShardRecord,
    columns: Iterable[str] = (),
    most_bytes: int | None = None,
    *,
    first_sequence: int | None = None,
) -> pa.Table:
    """Read the whole per-sequence table of a shard, which must have ``columns``; raises ``CorruptCacheError``.

    ``first_sequence`` is the number of its first sequence, where it shall be checked.
    """
    most = decoded_limit(most_bytes)
    schema, found = _read_columns(folder, shard, None, most_bytes=most, first_sequence=first_sequence)
    missing = [name for name in columns if name not in found]
    if missing:
        raise _wrong(folder, shard, f"no column {missing[0]!r}")
    return _as_table(schema, found)


def _as_table(schema: pa.Schema, columns: dict[str, pa.ChunkedArray]) -> pa.Table:
    return pa.table(list(columns.values()), schema=schema)


def _read_columns(
    folder: Folder,
    shard: ShardRecord,
    names: list[str] | None,
    *,
    most_bytes: int,
    check_hash: bool = True,
    first_sequence: int | None = None,
) -> tuple[pa.Schema, dict[str, pa.ChunkedArray]]:
    """Return the schema of a shard's table and those of the named columns (None: all) that it has, all checked.

    ``first_sequence`` is the number of the shard's first sequence in the cache, where it is known.
    """
    record = shard.objects[layout.SEQUENCES_FIELD]
    where = _where(folder, shard)

    def parse(data: bytes | pa.NativeFile) -> tuple[pa.Schema, pa.Table | None]:
        file = f"{where}, file {record.path}"
        if check_hash and hashlib.sha256(_view(data)).hexdigest() != record.sha256:
            raise CorruptCacheError(f"{file} is damaged (its sha256 is not the recorded one)")
        return decode_table(data, names, file, num_rows=shard.num_sequences, most_bytes=most_bytes)

    local = folder.local_path
    if local is None:
        schema, table = parsed_object(folder, record, where, parse)
    else:
        layout.check_size(folder, record, where)
        try:
            # Mapped: only the columns that are asked for are read from the disk.
            with pa.memory_map(str(local / record.path)) as file:
                schema, table = parse(file)
        except (OSError, ValueError) as error:
            raise CorruptCacheError(f"{where}, file {record.path} cannot be read: {error}") from None
    if table is None:
        return schema, {}
    problem = _wrong_numbers(table, shard, first_sequence)
    if problem:
        raise _wrong(folder, shard, problem)
    return schema, dict(zip(table.column_names, table.columns, strict=True))


def _wrong_numbers(table: pa.Table, shard: ShardRecord, first_sequence: int | None) -> str | None:
    """Return what the columns have that they cannot have, None where all is well."""
    numbers = {name: as_numpy(table[name]) for name in _COUNTED if name in table.column_names}
    for name, values in numbers.items():
        least = 0 if name == "num_targets" else 1
        if values.size and int(values.min()) < least:
            return f"a {name} of {int(values.min())}"
        total = sum(values.tolist()) if values.size else 0  # whole numbers of any size
        if name != "num_targets" and total != shard.num_rows[name.removeprefix("num_")]:
            found = shard.num_rows[name.removeprefix("num_")]
            return f"a {name} that adds up to {total}, the manifest says {found}"
    if first_sequence is not None and "sequence" in table.column_names:
        sequence = as_numpy(table["sequence"])
        if (sequence != np.arange(first_sequence, first_sequence + len(sequence))).any():
            return f"sequences that are not numbered from {first_sequence} on"
    return None


def _view(data: bytes | pa.NativeFile) -> memoryview:
    """Return the bytes of a file, of a mapped one without reading it."""
    if isinstance(data, bytes):
        return memoryview(data)
    data.seek(0)
    return memoryview(data.read_buffer())


def decode_table(
    data: bytes | pa.NativeFile,
    names: list[str] | None,
    where: str,
    *,
    num_rows: int | None = None,
    most_bytes: int | None = None,
) -> tuple[pa.Schema, pa.Table | None]:
    """Return the schema of an Arrow file and a table of its named columns (None: all), no table where it has none.

    The columns are validated in full. Raises ``CorruptCacheError`` naming ``where``, also unless the table has
    ``num_rows``; ``CacheError`` where it would take more than ``most_bytes`` in memory.
    """
    source = pa.BufferReader(data) if isinstance(data, bytes) else data
    most_bytes = decoded_limit(most_bytes)
    try:
        size = arrow_file.decoded_size(_view(data))
        if num_rows is not None and size.num_rows != num_rows:
            raise CorruptCacheError(
                f"{where}: the per-sequence table has {size.num_rows} rows for {num_rows} sequences"
            )
        check_decoded(size.num_bytes, most_bytes, f"{where}: the per-sequence table")
        schema = pa.ipc.open_file(source).schema
        arrow_file.check_schema(schema, arrow_file.SEQUENCE_COLUMNS)
        fields = [index for index, name in enumerate(schema.names) if names is None or name in names]
        if not fields:
            return schema, None
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        table = pa.ipc.open_file(source, options=options).read_all()
        arrow_file.check_values(table, arrow_file.SEQUENCE_COLUMNS)
        expanded = sum(map(arrow_file.expanded_bytes, table.columns))
        check_decoded(expanded, most_bytes, f"{where}: the per-sequence table")
        return schema, table
    except (pa.ArrowException, ValueError, OSError, TypeError, KeyError) as error:
        raise CorruptCacheError(f"{where} is not a readable Arrow file: {shortened(error, 300)}") from None


def _stacked(pieces: list[pa.ChunkedArray | None], lengths: list[int], kind: pa.DataType) -> pa.ChunkedArray:
    """Return the pieces of a column below one another, nulls where a shard lacks it."""
    chunks: list[pa.Array] = []
    for piece, length in zip(pieces, lengths, strict=True):
        if piece is None or pa.types.is_null(piece.type):
            chunks.append(pa.nulls(length, kind))
        elif piece.type != kind and pa.types.is_dictionary(kind):
            chunks += piece.dictionary_encode().cast(kind).chunks
        else:
            chunks += piece.chunks
    return pa.chunked_array(chunks, kind)


def _where(folder: Folder, shard: ShardRecord) -> str:
    return f"{folder}, shard {shard.index}, field {layout.SEQUENCES_FIELD}"


def _wrong(folder: Folder, shard: ShardRecord, found: str) -> CorruptCacheError:
    path = shard.objects[layout.SEQUENCES_FIELD].path
    return CorruptCacheError(f"{_where(folder, shard)}, file {path}: the per-sequence table has {found}")
