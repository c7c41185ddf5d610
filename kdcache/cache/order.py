"""The order of training, as a pure function of (key, seed, epoch): nothing to save, nothing to drift.

Shards are permuted, cut into windows of a few shards, and sequences are shuffled inside each window: a reader then
keeps only one window of shards in memory, and resuming needs no more than "epoch e, sequence n".

An `Order` is all that dealing out batches knows about it. `ShuffledOrder` is the plain one; the other one follows a
curriculum (`kdcache.cache.curriculum`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Order(Protocol):
    """What a run trains on, epoch by epoch; the same epoch is always the same."""

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the sequences of epoch ``number`` (from 0) in their order, [num_sequences] int64."""


@dataclass(frozen=True)
class ShuffledOrder:
    """Every sequence once an epoch, shuffled within windows of shards; see `epoch_order` for the fields.

    ``chosen_N`` are the sequences that take part (None: all). They come in the order that they have among all.
    """

    shard_starts: NDArray[np.int64]
    seed: int
    window_shards: int
    key: str
    chosen_N: NDArray[np.int64] | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        return int(self.shard_starts[-1]) if self.chosen_N is None else len(self.chosen_N)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the sequences of epoch ``number`` in their order, [num_sequences] int64."""
        order_N = epoch_order(self.shard_starts, self.seed, number, self.window_shards, self.key)
        if self.chosen_N is None:
            return order_N
        is_chosen_N = np.zeros(len(order_N), dtype=bool)
        is_chosen_N[self.chosen_N] = True
        return order_N[is_chosen_N[order_N]]


def epoch_order(
    shard_starts: NDArray[np.int64], seed: int, epoch: int, window_shards: int = 4, key: str = ""
) -> NDArray[np.int64]:
    """Return every sequence once, [N] int64, in the order of ``epoch``.

    ``shard_starts`` [num_shards + 1] are the first sequence of every shard and the total.
    """
    generator = generator_of(f"{key}/{seed}/{epoch}")
    shards = generator.permutation(len(shard_starts) - 1)
    pieces = []
    for begin in range(0, len(shards), window_shards):
        window = [np.arange(shard_starts[s], shard_starts[s + 1]) for s in shards[begin : begin + window_shards]]
        pieces.append(generator.permutation(np.concatenate(window)))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def generator_of(name: str) -> np.random.Generator:
    """Return the random numbers that belong to ``name``."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
