"""Samples as small numbers: which ids were sampled how often, without order.

The order of sampling means nothing, so a row is sorted by count (most first) and then by frequency rank. An id is
stored as the step from its neighbour of the same count. Most ids are sampled once, so most are stored as steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs.ids import OpenTables, id_dtype, rank_ids, sorted_steps, undo_sorted_steps
from kdcache.codecs.ragged import expand, flatten
from kdcache.schema import ArrayRecord, Samples


def count_dtype(largest: int) -> str:
    """Return the smallest unsigned dtype that holds every count up to ``largest``."""
    return "uint8" if largest < 1 << 8 else "uint16" if largest < 1 << 16 else "uint32"


def sample_arrays(num_samples: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
    """Describe the arrays of samples."""
    count, ids = count_dtype(num_samples), id_dtype(vocab_size)
    return (
        ArrayRecord(name="num_sampled", dtype=count, rows="positions"),
        ArrayRecord(name="sample_counts", dtype=count, rows="samples"),
        ArrayRecord(name="sample_ranks", dtype=ids, rows="samples"),
        ArrayRecord(name="sample_table", dtype=ids, rows="table"),
    )


def encode_samples(samples: Samples, num_samples: int, vocab_size: int) -> dict[str, NDArray[Any]]:
    """Encode the samples of P rows, ``num_samples`` in each (or none at all)."""
    counts_PJ, sampled_PJ = samples.counts_PJ.astype(np.int64), samples.counts_PJ > 0
    ranks_V, table = rank_ids(samples.ids_PJ[sampled_PJ], vocab_size)
    # One number that sorts as wanted: count, most first, then rank; padding has count 0 and comes last.
    keys_PJ = ((num_samples - counts_PJ) << 32) | ranks_V[samples.ids_PJ]
    keys_PJ.sort(axis=1)
    counts_PJ = num_samples - (keys_PJ >> 32)
    ranks_PJ = (keys_PJ & 0xFFFFFFFF).astype(table.dtype)
    same_PJ = np.zeros(counts_PJ.shape, dtype=bool)
    same_PJ[:, 1:] = counts_PJ[:, 1:] == counts_PJ[:, :-1]
    num_P = sampled_PJ.sum(axis=1)
    count = count_dtype(num_samples)
    return {
        "num_sampled": num_P.astype(count),
        "sample_counts": flatten(counts_PJ.astype(count), num_P),
        "sample_ranks": flatten(sorted_steps(ranks_PJ, same_PJ), num_P),
        "sample_table": table,
    }


def open_samples(arrays: Mapping[str, NDArray[Any]], most: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of a shard with rows of samples as rectangles [P, J], still encoded.

    No row has more than ``most`` distinct ids. Raises ``CorruptCacheError``.
    """
    num_P = arrays["num_sampled"]
    width = min(int(num_P.max(initial=0)), most)
    opened = {name: expand(arrays[name], num_P, width, name) for name in ("sample_counts", "sample_ranks")}
    return {**arrays, **opened}


def decode_samples(arrays: Mapping[str, NDArray[Any]]) -> Samples:
    """Decode rows of what `open_samples` returned."""
    counts_JP = arrays["sample_counts"].T
    same_JP = np.zeros(counts_JP.shape, dtype=bool)
    same_JP[1:] = counts_JP[1:] == counts_JP[:-1]
    ranks_JP = undo_sorted_steps(arrays["sample_ranks"].T, same_JP)
    tables = OpenTables.of(arrays["sample_table"], ranks_JP.shape[1])
    ids_JP = np.empty(ranks_JP.shape, dtype=tables.dtype)
    tables.write_ids(ranks_JP, 0, ids_JP, "sample_table")
    return Samples(ids_JP.T, counts_JP.T)
