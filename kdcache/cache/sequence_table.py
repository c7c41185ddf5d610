"""The per-sequence table of a cache, read column by column: each column at most once while the cache is open.

A table of ten million sequences with metadata takes gigabytes, and most callers want one column of numbers: the lengths
for batching, the teacher's loss for a curriculum, the columns that a filter names. Every shard stores its part of the
table as an Arrow file, from which single columns can be decoded.

`SequenceTable` has the members of ``pyarrow.Table`` that filters use (``column_names``, ``schema``, ``num_rows``, and
``table[name]``), so a filter works on either.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from kdcache.cache import layout
from kdcache.cache.shards import parsed_object
from kdcache.errors import CorruptCacheError
from kdcache.schema import ShardRecord
from kdcache.storage.folder import Folder

#: Per-sequence tables that are read at the same time from a remote cache.
TABLES_AT_ONCE = 8
#: Shards whose whole tables stay in memory for `SequenceTable.row`.
_ROW_SHARDS = 8


class SequenceTable:
    """The per-sequence tables of ``shards``, one below the other; safe to use from several threads."""

    def __init__(self, folder: Folder, shards: Sequence[ShardRecord]) -> None:
        self.num_rows = sum(shard.num_sequences for shard in shards)
        self._folder, self._shards = folder, shards
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
                self._rows[shard] = load_table(self._folder, self._shards[shard])
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
        def read(shard: ShardRecord) -> tuple[pa.Schema, dict[str, pa.ChunkedArray]]:
            return _read_columns(self._folder, shard, names)

        # Small objects of a remote cache take their time one by one.
        with ThreadPoolExecutor(1 if self._folder.store is None else TABLES_AT_ONCE) as pool:
            found = list(pool.map(read, self._shards))
        if self._schema is None:
            self._schema = self._unified([schema for schema, _ in found])
        for name in names:
            if name in self._schema.names:
                kind = self._schema.field(name).type
                pieces = [columns.get(name) for _, columns in found]
                self._columns[name] = _stacked(pieces, [shard.num_sequences for shard in self._shards], kind)

    def _unified(self, schemas: list[pa.Schema]) -> pa.Schema:
        """Return the schema of all shards together, and note the columns that some of them lack."""
        try:
            unified = pa.unify_schemas(schemas or [pa.schema([])], promote_options="default")
        except pa.ArrowException as error:
            raise CorruptCacheError(
                f"{self._folder}, field {layout.SEQUENCES_FIELD}: the tables of the shards differ: {error}"
            ) from None
        for shard, schema in zip(self._shards, schemas, strict=True):
            for name in set(unified.names) - set(schema.names):
                self._lacking.setdefault(name, shard)
        return unified


def load_table(folder: Folder, shard: ShardRecord, columns: Iterable[str] = ()) -> pa.Table:
    """Read the whole per-sequence table of a shard, which must have ``columns``; raises ``CorruptCacheError``."""
    schema, found = _read_columns(folder, shard, None)
    missing = [name for name in columns if name not in found]
    if missing:
        raise _wrong(folder, shard, f"no column {missing[0]!r}")
    return pa.table(list(found.values()), schema=schema)


def _read_columns(
    folder: Folder, shard: ShardRecord, names: list[str] | None
) -> tuple[pa.Schema, dict[str, pa.ChunkedArray]]:
    """Return the schema of a shard's table and those of the named columns (None: all) that it has."""
    record = shard.objects[layout.SEQUENCES_FIELD]
    where = _where(folder, shard)

    def parse(data: bytes | pa.NativeFile) -> tuple[pa.Schema, pa.Table | None]:
        return decode_table(data, names, f"{where}, file {record.path}")

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
    if table.num_rows != shard.num_sequences:
        raise _wrong(folder, shard, f"{table.num_rows} rows for {shard.num_sequences} sequences")
    return schema, dict(zip(table.column_names, table.columns, strict=True))


def decode_table(data: bytes | pa.NativeFile, names: list[str] | None, where: str) -> tuple[pa.Schema, pa.Table | None]:
    """Return the schema of an Arrow file and a table of its named columns (None: all), no table where it has none.

    Raises ``CorruptCacheError`` naming ``where``.
    """
    source = pa.BufferReader(data) if isinstance(data, bytes) else data
    try:
        schema = pa.ipc.open_file(source).schema
        if len(set(schema.names)) < len(schema.names):
            raise ValueError("a column name appears twice")
        fields = [index for index, name in enumerate(schema.names) if names is None or name in names]
        if not fields:
            return schema, None
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        return schema, pa.ipc.open_file(source, options=options).read_all()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise CorruptCacheError(f"{where} is not a readable Arrow file: {error}") from None


def _stacked(pieces: list[pa.ChunkedArray | None], lengths: list[int], kind: pa.DataType) -> pa.ChunkedArray:
    """Return the pieces of a column below one another, nulls where a shard lacks it."""
    chunks: list[pa.Array] = []
    for piece, length in zip(pieces, lengths, strict=True):
        if piece is None or pa.types.is_null(piece.type):
            chunks.append(pa.nulls(length, kind))
        else:
            chunks += piece.chunks
    return pa.chunked_array(chunks, kind)


def _where(folder: Folder, shard: ShardRecord) -> str:
    return f"{folder}, shard {shard.index}, field {layout.SEQUENCES_FIELD}"


def _wrong(folder: Folder, shard: ShardRecord, found: str) -> CorruptCacheError:
    path = shard.objects[layout.SEQUENCES_FIELD].path
    return CorruptCacheError(f"{_where(folder, shard)}, file {path}: the per-sequence table has {found}")
