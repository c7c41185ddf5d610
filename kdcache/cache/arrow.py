"""A cache as Arrow tables, one row per sequence, for tools other than kdcache.

A row is the sequence's row of the per-sequence table and everything that `Cache.read` returns, as lists:
tokens of T entries, positions of P (what a position is, the task says), and where a position has several values (kept
ids, states, a teacher's raw outputs) a list of lists, of fixed size where every position has equally many. So one row
holds everything about a sequence, and a row's meaning does not depend on its neighbours.

Everything streams: `to_arrow_reader` decodes a few thousand positions at a time and `to_arrow` collects what it yields.
Decoded rows take 8 bytes per kept id where the cache has about 1.3, so this is for looking, filtering and moving a part
of a cache to other tools, not for training from it: `Cache.batches` and ``to_torch`` read the cache itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache.reader import Cache
from kdcache.corpus import assign_shards
from kdcache.schema import OUTPUTS_FIELD, SequenceBatch

#: Positions that are decoded at once, about.
BATCH_POSITIONS = 8192


def to_arrow(
    cache: Cache, indices: Iterable[int] | None = None, *, fields: Iterable[str] = (), top_k: int | None = None
) -> pa.Table:
    """Return sequences of a cache (default: all) as a table in memory, one row each; see `to_arrow_reader`."""
    return to_arrow_reader(cache, indices, fields=fields, top_k=top_k).read_all()


def to_arrow_reader(
    cache: Cache,
    indices: Iterable[int] | None = None,
    *,
    fields: Iterable[str] = (),
    top_k: int | None = None,
    batch_positions: int = BATCH_POSITIONS,
) -> pa.RecordBatchReader:
    """Return sequences of a cache (default: all) as a stream of record batches, in the order of ``indices``.

    Columns are those of the per-sequence table, then ``tokens`` [T], and per position ``loss_mask``, ``ids`` [K],
    ``logprobs`` [K], ``log_tail``, ``gold_logprob`` (NaN: no label), ``entropy``; where the cache has them
    ``segment_ids`` [T], ``labels`` (int64, `NO_LABEL` for none, or float32, NaN for none), ``token_index``,
    ``num_kept``, ``log_tails`` [G], ``sample_ids`` and ``sample_counts``; and further ``fields`` under their
    names. Where the teacher gives no distribution, ``outputs`` [C] replaces its columns, whether asked for or not.

    A column of the per-sequence table whose name is one of these gets ``table_`` in front. Batches hold about
    ``batch_positions`` positions. Raises ``CacheError`` for sequences, fields or a ``top_k`` that the cache does not
    have.
    """
    rows_N = chosen_rows(cache, indices)
    # Without its outputs a table of such a cache would say nothing of the teacher.
    own = (OUTPUTS_FIELD,) if cache.manifest.targets.kind == "outputs" else ()
    names = tuple(dict.fromkeys((*fields, *own)))
    table = cache.sequence_table()
    # What an array looks like is said once, where it is made: the schema is that of a batch.
    first = _record_batch(cache.read([0], fields=names, top_k=top_k), table.slice(0, 1))

    def batches() -> Iterator[pa.RecordBatch]:
        bounds = assign_shards(cache.lengths_N[rows_N], batch_positions)
        for start, stop in pairwise(bounds.tolist()):
            piece_N = rows_N[start:stop]
            batch = cache.read(piece_N.tolist(), fields=names, top_k=top_k)
            yield _record_batch(batch, table.take(pa.array(piece_N)))

    return pa.RecordBatchReader.from_batches(first.schema, batches())


def chosen_rows(cache: Cache, indices: Iterable[int] | None) -> NDArray[np.int64]:
    """Return ``indices`` as an array (all sequences for None), [N]; raises ``CacheError`` for unknown ones."""
    if indices is None:
        return np.arange(len(cache))
    rows_N = np.array([int(index) for index in indices], dtype=np.int64)
    for index in (rows_N.min(), rows_N.max()) if len(rows_N) else ():
        cache.shard_of(int(index))
    return rows_N


def _record_batch(batch: SequenceBatch, rows: pa.Table) -> pa.RecordBatch:
    columns = _columns(batch)
    metadata = rows.combine_chunks().to_batches()[0]
    named = {_free_name(name, columns): metadata[name] for name in metadata.schema.names}
    return pa.RecordBatch.from_pydict(named | columns)


def _free_name(name: str, taken: Iterable[str]) -> str:
    while name in taken:
        name = f"table_{name}"
    return name


def _columns(batch: SequenceBatch) -> dict[str, pa.Array]:
    """Return what a batch holds as one list per sequence and name."""
    columns: dict[str, pa.Array] = {}
    for name, field in batch.kinds.items():
        columns |= field.columns(name, batch)
    return columns
