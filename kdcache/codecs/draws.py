"""Draws as small numbers: which ids were drawn how often, without order.

Which draw came first means nothing, so a row is sorted by count (most first) and then by frequency rank, and an id is
the step from its neighbour of the same count. Most ids are drawn once, so most steps are steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs.ragged import expand, flatten
from kdcache.codecs.ranks import OpenTables, id_dtype, rank_ids, sorted_steps, undo_sorted_steps
from kdcache.schema import ArrayRecord, Draws


def count_dtype(largest: int) -> str:
    """Return the smallest unsigned dtype that holds every count up to ``largest``."""
    return "uint8" if largest < 1 << 8 else "uint16" if largest < 1 << 16 else "uint32"


def draw_arrays(num_draws: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
    """Describe the arrays of draws."""
    count, ids = count_dtype(num_draws), id_dtype(vocab_size)
    return (
        ArrayRecord(name="num_drawn", dtype=count, rows="positions"),
        ArrayRecord(name="draw_counts", dtype=count, rows="draws"),
        ArrayRecord(name="draw_ranks", dtype=ids, rows="draws"),
        ArrayRecord(name="draw_table", dtype=ids, rows="table"),
    )


def encode_draws(draws: Draws, num_draws: int, vocab_size: int) -> dict[str, NDArray[Any]]:
    """Encode the draws of P rows, ``num_draws`` in each (or none at all)."""
    counts_PJ, drawn_PJ = draws.counts_PJ.astype(np.int64), draws.counts_PJ > 0
    ranks_V, table = rank_ids(draws.ids_PJ[drawn_PJ], vocab_size)
    # One number that sorts as wanted: count, most first, then rank; padding has count 0 and comes last.
    keys_PJ = ((num_draws - counts_PJ) << 32) | ranks_V[draws.ids_PJ]
    keys_PJ.sort(axis=1)
    counts_PJ = num_draws - (keys_PJ >> 32)
    ranks_PJ = (keys_PJ & 0xFFFFFFFF).astype(table.dtype)
    same_PJ = np.zeros(counts_PJ.shape, dtype=bool)
    same_PJ[:, 1:] = counts_PJ[:, 1:] == counts_PJ[:, :-1]
    num_P = drawn_PJ.sum(axis=1)
    count = count_dtype(num_draws)
    return {
        "num_drawn": num_P.astype(count),
        "draw_counts": flatten(counts_PJ.astype(count), num_P),
        "draw_ranks": flatten(sorted_steps(ranks_PJ, same_PJ), num_P),
        "draw_table": table,
    }


def open_draws(arrays: Mapping[str, NDArray[Any]], most: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of a shard with rows of draws as rectangles [P, J], still encoded.

    No row has more than ``most`` distinct ids. Raises ``CorruptCacheError``.
    """
    num_P = arrays["num_drawn"]
    width = min(int(num_P.max(initial=0)), most)
    opened = {name: expand(arrays[name], num_P, width, name) for name in ("draw_counts", "draw_ranks")}
    return {**arrays, **opened}


def decode_draws(arrays: Mapping[str, NDArray[Any]]) -> Draws:
    """Decode rows of what `open_draws` returned."""
    counts_JP = arrays["draw_counts"].T
    same_JP = np.zeros(counts_JP.shape, dtype=bool)
    same_JP[1:] = counts_JP[1:] == counts_JP[:-1]
    ranks_JP = undo_sorted_steps(arrays["draw_ranks"].T, same_JP)
    tables = OpenTables.of(arrays["draw_table"], ranks_JP.shape[1])
    ids_JP = np.empty(ranks_JP.shape, dtype=tables.dtype)
    tables.write_ids(ranks_JP, 0, ids_JP, "draw_table")
    return Draws(ids_JP.T, counts_JP.T)
