"""Token ids as small numbers: how often an id occurs in a shard decides its rank, and the shard holds the table.

Frequent ids get small ranks, whose high bits are mostly zero and vanish in the byte-level compressor. Ranks need only
be *roughly* by frequency, so ids of similar counts (a factor of the square root of 2) are a class, in which they stand
in ascending order. The table is then a few hundred ascending runs, and its differences cost half of what ids would.

Differences are taken modulo the dtype's range, here and in `sorted_steps`: unsigned arithmetic undoes them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError

#: Classes per doubling of the count. More cost bytes in the table, fewer in the ranks; 2 measures best.
_CLASSES_PER_DOUBLING = 2


def id_dtype(vocab_size: int) -> str:
    """Return the smallest unsigned dtype that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def rank_ids(ids: NDArray[Any], vocab_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the rank of every id below ``vocab_size`` [V], and the table that leads back from ranks to ids.

    ``ids`` (any shape) are those whose frequency counts and which get ranks; the rank of others means nothing.
    """
    counts = np.bincount(ids.reshape(-1), minlength=vocab_size)
    used = np.flatnonzero(counts)
    classes = -np.floor(np.log2(counts[used]) * _CLASSES_PER_DOUBLING).astype(np.int64)
    order = used[np.argsort(classes, kind="stable")]
    ranks_V = np.zeros(vocab_size, dtype=id_dtype(vocab_size))
    ranks_V[order] = np.arange(len(order))
    table = order.astype(id_dtype(vocab_size))
    return ranks_V, np.diff(table, prepend=table.dtype.type(0))


def ids_of_ranks(ranks: NDArray[Any], table: NDArray[Any], name: str) -> NDArray[Any]:
    """Return the ids of ``ranks``; raises ``CorruptCacheError`` for a rank outside the table called ``name``."""
    return _look_up(ranks, open_table(table), name)


def open_table(table: NDArray[Any]) -> NDArray[Any]:
    """Return the id of every rank, from the table as it is stored."""
    return np.cumsum(table, dtype=table.dtype)


@dataclass(frozen=True)
class OpenTables:
    """What `open_table` returned, for rows of one or several shards.

    Rows ``starts_S1[n]`` to ``starts_S1[n + 1]`` have their ranks from ``tables[n]``.
    """

    tables: Sequence[NDArray[Any]]
    starts_S1: Sequence[int]

    @classmethod
    def of(cls, table: NDArray[Any] | OpenTables, num_rows: int) -> OpenTables:
        """Return tables of ``num_rows`` rows: these, or the stored one of a single shard, opened."""
        return table if isinstance(table, OpenTables) else cls([open_table(table)], [0, num_rows])

    @property
    def dtype(self) -> np.dtype[Any]:
        """What ids are stored as."""
        return self.tables[0].dtype

    def write_ids(self, ranks_KB: NDArray[Any], first_row: int, out_KB: NDArray[Any], name: str) -> None:
        """Write the ids of the rows from ``first_row`` on to ``out_KB``; raises as `ids_of_ranks` does."""
        last_row = first_row + ranks_KB.shape[1]
        for table, start, stop in zip(self.tables, self.starts_S1[:-1], self.starts_S1[1:], strict=True):
            rows = slice(max(start - first_row, 0), max(min(stop, last_row) - first_row, 0))
            if rows.start < rows.stop:
                out_KB[:, rows] = _look_up(ranks_KB[:, rows], table, name)


def _look_up(ranks: NDArray[Any], ids: NDArray[Any], name: str) -> NDArray[Any]:
    if not ranks.size:
        return ranks.astype(ids.dtype)
    if int(ranks.max()) >= len(ids):
        raise CorruptCacheError(f"a rank is {int(ranks.max())}, but {name} has {len(ids)} entries")
    return np.take(ids, ranks)


def sorted_steps(ranks: NDArray[Any], same: NDArray[np.bool_]) -> NDArray[Any]:
    """Return ranks [P, K] where ``same`` as the step from the column before, elsewhere as they are.

    Ids whose order means nothing are sorted by rank, so steps are small numbers; this is where a set costs less than a
    sequence. ``same`` is False in column 0.
    """
    steps = ranks.copy()
    steps[:, 1:] -= np.where(same[:, 1:], ranks[:, :-1], ranks.dtype.type(0))
    return steps


def undo_sorted_steps(steps_KP: NDArray[Any], same_KP: NDArray[np.bool_]) -> NDArray[Any]:
    """Undo `sorted_steps`, laid out column by column: [K, P] in, [K, P] out."""
    ranks_KP = np.empty_like(steps_KP)
    if not len(steps_KP):
        return ranks_KP
    carried_P = np.empty_like(steps_KP[0])
    # Multiplying by 0 or 1 beats a masked addition several times over.
    same_KP = same_KP.astype(steps_KP.dtype)
    ranks_KP[0] = steps_KP[0]
    for k in range(1, len(steps_KP)):
        np.multiply(ranks_KP[k - 1], same_KP[k], out=carried_P)
        np.add(steps_KP[k], carried_P, out=ranks_KP[k])
    return ranks_KP
