"""Finding sequences by where they come from: documents and sequence ids, as the plan's table names them.

The per-sequence table knows the *first* document of a packed window; ``plan.parquet`` has one row for every piece of a
document in a sequence, so it also finds a document in the middle of a window, or one that was cut into several
sequences. Questions about anything else are for filters (`kdcache.cache.filters`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.schema import Manifest
from kdcache.storage.folder import Folder


def read_plan_table(folder: Folder, manifest: Manifest) -> pa.Table:
    """Return the table of ``plan.parquet``, checked: one row for every piece of a document in a sequence.

    Raises ``CorruptCacheError`` when it is missing or damaged, or names sequences that there are not.
    """
    try:
        data = folder.read(layout.PLAN_TABLE)
    except FileNotFoundError:
        data = b""
    if layout.sha256(data) != manifest.table_sha256:
        raise CorruptCacheError(
            f"{folder}/{layout.PLAN_TABLE} is missing or damaged (its sha256 is not the plan's); the command "
            "that made the cache writes it again"
        )
    table = pq.read_table(pa.BufferReader(data))
    sequences = np.asarray(table["sequence"])
    if sequences.size and not 0 <= sequences.min() <= sequences.max() < manifest.num_sequences:
        raise CorruptCacheError(f"{folder}/{layout.PLAN_TABLE} names sequences that the cache does not have")
    return table


def sequences_with(table: pa.Table, column: str, value: str, where: str) -> NDArray[np.int64]:
    """Return the sequences of the plan's ``table`` that hold a piece whose ``column`` is ``value``, ascending.

    Raises ``CacheError``, naming the cache as ``where``, when there is none.
    """
    if column not in table.column_names:
        raise CacheError(f"{where}: its plan has no column {column} (it has {', '.join(table.column_names)})")
    ids = pc.cast(table[column], pa.string())
    found = table.filter(pc.equal(ids, value))["sequence"]
    if not len(found):
        raise CacheError(
            f"{where}: nothing has the {column} {value!r}; the first one is {ids[0].as_py()!r}, and sequence_table() "
            "lists them"
        )
    return np.unique(np.asarray(found)).astype(np.int64)


def num_tokens_of(table: pa.Table) -> NDArray[np.int64]:
    """Return the tokens of every row of a per-sequence table, [N]; a table that does not say has one more than rows."""
    if "num_tokens" in table.column_names:
        return np.asarray(table["num_tokens"]).astype(np.int64)
    return np.asarray(table["num_positions"]).astype(np.int64) + 1
