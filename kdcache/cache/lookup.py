"""Find sequences by document id and sequence id, as ``plan.parquet`` records them.

The per-sequence table names only the *first* document of a packed window. ``plan.parquet`` has one row for every piece
of a document in a sequence, so it also finds a document in the middle of a window, and all sequences of a document
that was cut. For conditions on other columns use filters (`kdcache.cache.filters`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache import arrow_file, layout
from kdcache.cache.columns import as_numpy
from kdcache.cache.limits import check_decoded, decoded_limit
from kdcache.errors import CacheError, CorruptCacheError, shortened
from kdcache.schema import Manifest
from kdcache.storage.folder import Folder

if TYPE_CHECKING:
    from kdcache.cache.sequence_table import SequenceTable


class PlanTable:
    """The table of ``plan.parquet``, by column: each is read at most once."""

    def __init__(self, folder: Folder, manifest: Manifest, most_bytes: int | None = None) -> None:
        self._folder, self._manifest = folder, manifest
        self._most_bytes = decoded_limit(most_bytes)
        self._schema: pa.Schema | None = None
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._lock = threading.Lock()

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the named columns (None: all); unknown names are left out.

        Raises ``CorruptCacheError`` when the file is missing or damaged, or names sequences that the cache lacks.
        """
        with self._lock:
            if self._schema is None or set(columns or self._schema.names) & set(self._schema.names) - set(
                self._columns
            ):
                self._read(columns)
            assert self._schema is not None
            fields = [field for field in self._schema if columns is None or field.name in columns]
            schema = pa.schema(fields, metadata=self._schema.metadata)
            return pa.table([self._columns[field.name] for field in fields], schema=schema)

    def clear(self) -> None:
        """Forget everything that was read."""
        with self._lock:
            self._columns.clear()
            self._schema = None

    def _read(self, columns: Sequence[str] | None) -> None:
        import pyarrow.parquet as pq

        where = f"{self._folder}/{layout.PLAN_TABLE}"
        data = checked_plan_table(self._folder, self._manifest)
        try:
            schema = pq.ParquetFile(pa.BufferReader(data)).schema_arrow
            arrow_file.check_schema(schema, arrow_file.PLAN_COLUMNS)
            if "sequence" not in schema.names:
                raise ValueError("it has no column 'sequence'")
            wanted = [n for n in schema.names if n not in self._columns and (columns is None or n in columns)]
            table = self._decoded(pa.BufferReader(data), schema, wanted, where)
            arrow_file.check_values(table, arrow_file.PLAN_COLUMNS)
            if "sequence" in wanted:
                _check_sequences(table, self._folder, self._manifest)
        except (pa.ArrowException, ValueError, OSError, TypeError, KeyError, NotImplementedError) as error:
            raise CorruptCacheError(f"{where} is not a readable table of the plan: {shortened(error, 300)}") from None
        self._schema = schema
        self._columns |= dict(zip(table.column_names, table.columns, strict=True))

    def _decoded(self, source: pa.NativeFile, schema: pa.Schema, wanted: list[str], where: str) -> pa.Table:
        """Return columns of the Parquet file, once it is known how many bytes they take."""
        import pyarrow.parquet as pq

        # Texts come as dictionaries first: a text of a few bytes in the file may stand in every row.
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        file = pq.ParquetFile(source, read_dictionary=texts)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        sizes = [group.column(n).total_uncompressed_size for group in groups for n in range(group.num_columns)]
        num_bytes = sum(sizes) + 8 * file.metadata.num_rows * max(len(wanted), 1)
        check_decoded(num_bytes, self._most_bytes, where)
        table = file.read(columns=wanted, use_threads=False)  # threads of Arrow's own take more memory than time
        table.validate(full=True)
        check_decoded(sum(map(arrow_file.expanded_bytes, table.columns)), self._most_bytes, where)
        return table.cast(pa.schema([schema.field(name) for name in table.column_names]))


def read_plan_table(folder: Folder, manifest: Manifest, most_bytes: int | None = None) -> pa.Table:
    """Return the table of ``plan.parquet``, checked: one row for every piece of a document in a sequence.

    Raises ``CorruptCacheError`` when it is missing or damaged, or names sequences that the cache lacks.
    """
    return PlanTable(folder, manifest, most_bytes).table()


def checked_plan_table(folder: Folder, manifest: Manifest) -> bytes:
    """Return the bytes of ``plan.parquet``; raise ``CorruptCacheError`` unless they have the recorded hash."""
    try:
        data = folder.read(layout.PLAN_TABLE, max_bytes=layout.MAX_TABLE_BYTES)
    except (FileNotFoundError, CorruptCacheError):
        data = b""
    if layout.sha256(data) != manifest.table_sha256:
        raise CorruptCacheError(
            f"{folder}/{layout.PLAN_TABLE} is missing or damaged: its sha256 is not the recorded one; run the command "
            "that made the cache again, which writes the file again"
        )
    return data


def _check_sequences(table: pa.Table, folder: Folder, manifest: Manifest) -> None:
    sequences = as_numpy(table["sequence"])
    if sequences.size and not 0 <= sequences.min() <= sequences.max() < manifest.num_sequences:
        raise CorruptCacheError(f"{folder}/{layout.PLAN_TABLE} names sequences that the cache does not have")


def sequences_with(plan: PlanTable, column: str, value: str, where: str) -> NDArray[np.int64]:
    """Return the sequences with a piece whose ``column`` is ``value``, ascending.

    Raises ``CacheError``, naming the cache as ``where``, when there is none.
    """
    import pyarrow.compute as pc

    table = plan.table(["sequence", column])
    if column not in table.column_names:
        known = ", ".join(plan.table().column_names)
        raise CacheError(f"{where}: unknown column {column!r} of {layout.PLAN_TABLE}; known: {known}")
    ids = pc.cast(table[column], pa.string())
    found = table.filter(pc.equal(ids, value))["sequence"]
    if not len(found):
        raise CacheError(
            f"{where}: no sequence has the {column} {value!r}; the first {column} is {ids[0].as_py()!r}, "
            "sequence_table() lists all"
        )
    return np.unique(as_numpy(found)).astype(np.int64)


def renumbered_plan(
    table: pa.Table, chosen_N: NDArray[np.int64], starts: NDArray[np.int64], num_sequences: int
) -> pa.Table:
    """Return the plan's ``table`` of the sequences ``chosen_N`` alone, numbered from 0.

    ``starts`` are the first (new) sequence of every shard and the total; ``num_sequences`` is that of the old plan.
    """
    numbers = np.full(num_sequences, -1)
    numbers[chosen_N] = np.arange(len(chosen_N))
    sequence = numbers[as_numpy(table["sequence"])]
    is_chosen = sequence >= 0
    table = with_column(table.filter(pa.array(is_chosen)), "sequence", sequence[is_chosen])
    shard = np.searchsorted(starts, sequence[is_chosen], side="right") - 1
    return with_column(table, "shard", shard.astype(np.int32))


def with_column(table: pa.Table, name: str, values: NDArray[Any]) -> pa.Table:
    """Return ``table`` with other values in a column, which keeps its type, or with a new column."""
    if name not in table.column_names:
        return table.append_column(name, pa.array(values))
    index = table.column_names.index(name)
    field = table.schema.field(index)
    return table.set_column(index, field, pa.array(values, field.type))


def num_tokens_of(table: pa.Table | SequenceTable) -> NDArray[np.int64]:
    """Return the tokens of every row of a per-sequence table, [N]; without such a column, positions + 1."""
    if "num_tokens" in table.column_names:
        return as_numpy(table["num_tokens"]).astype(np.int64)
    return as_numpy(table["num_positions"]).astype(np.int64) + 1
