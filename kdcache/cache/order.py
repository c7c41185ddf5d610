"""The order of an epoch, as a pure function of (key, seed, epoch): nothing to save, nothing to drift.

Shards are permuted, cut into windows of a few shards, and sequences are shuffled inside each window: a reader then
keeps only one window of shards in memory, and resuming needs no more than "epoch e, sequence n".
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def epoch_order(
    shard_starts: NDArray[np.int64], seed: int, epoch: int, window_shards: int = 4, key: str = ""
) -> NDArray[np.int64]:
    """Return every sequence once, [N] int64, in the order of ``epoch``.

    ``shard_starts`` [num_shards + 1] are the first sequence of every shard and the total.
    """
    digest = hashlib.sha256(f"{key}/{seed}/{epoch}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    shards = generator.permutation(len(shard_starts) - 1)
    pieces = []
    for begin in range(0, len(shards), window_shards):
        window = [np.arange(shard_starts[s], shard_starts[s + 1]) for s in shards[begin : begin + window_shards]]
        pieces.append(generator.permutation(np.concatenate(window)))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
