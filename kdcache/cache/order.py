"""The order of training, a pure function of (key, seed, epoch), so there is no state to save.

Shards are permuted and grouped into windows of a few shards, and the sequences of each window are shuffled. The
resulting list is cut into *canonical streams* of equal length, and an epoch takes one sequence from each in turn:
sample g of the epoch is number ``g // num_streams`` of stream ``g % num_streams``. So

- every batch mixes as many parts of the cache as there are streams, while a reader keeps only
  ``num_streams x window_shards`` shards in memory;
- rank r of R takes the samples ``g = r (mod R)``. If R divides the number of streams, these are whole streams, and a
  rank reads only its share of the shards; any other R gives correct results too, but several ranks read the same
  shards;
- the order does not depend on the ranks, so a run can resume with another number of ranks, from "epoch e, sample g".

`Order` is the interface that `kdcache.cache.batches` uses. `ShuffledOrder` is the default; `PacedOrder` follows a
curriculum (`kdcache.cache.curriculum`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError

#: Default number of canonical streams of an epoch: up to so many ranks can read disjoint shards.
NUM_STREAMS = 8


class Order(Protocol):
    """The sequences of a run, epoch by epoch; deterministic."""

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the sequences of epoch ``number`` (from 0) in their order, [num_sequences] int64."""


@dataclass(frozen=True)
class ShuffledOrder:
    """Every sequence once an epoch, shuffled within windows of shards; see `epoch_order` for the fields.

    Raises ``ConfigError`` for fewer than one stream or shard of a window.
    """

    shard_starts: NDArray[np.int64]
    seed: int
    window_shards: int
    key: str
    chosen_N: NDArray[np.int64] | None = None
    num_streams: int = NUM_STREAMS

    def __post_init__(self) -> None:
        for name, value in (("shuffle_window", self.window_shards), ("num_streams", self.num_streams)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        return int(self.shard_starts[-1]) if self.chosen_N is None else len(self.chosen_N)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the sequences of epoch ``number`` in their order, [num_sequences] int64."""
        return epoch_order(
            self.shard_starts,
            self.seed,
            number,
            self.window_shards,
            self.key,
            num_streams=self.num_streams,
            chosen_N=self.chosen_N,
        )


@dataclass(frozen=True)
class SequentialOrder:
    """The sequences ``chosen_N`` [N] in the stored order, the same in every epoch."""

    chosen_N: NDArray[np.int64]

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        return len(self.chosen_N)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the sequences in their order, [num_sequences] int64."""
        return self.chosen_N


def epoch_order(
    shard_starts: NDArray[np.int64],
    seed: int,
    epoch: int,
    window_shards: int = 1,
    key: str = "",
    *,
    num_streams: int = NUM_STREAMS,
    chosen_N: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Return every sequence once, [N] int64, in the order of ``epoch``.

    ``shard_starts`` [num_shards + 1] are the first sequence of every shard and the total; ``chosen_N`` are the
    sequences to include (None: all).
    """
    generator = generator_of(f"{key}/{seed}/{epoch}")
    shards = generator.permutation(len(shard_starts) - 1)
    pieces = [np.empty(0, dtype=np.int64)]
    for begin in range(0, len(shards), window_shards):
        window = [np.arange(shard_starts[s], shard_starts[s + 1]) for s in shards[begin : begin + window_shards]]
        pieces.append(generator.permutation(np.concatenate(window)))
    laid_out = np.concatenate(pieces)
    if chosen_N is not None:
        is_chosen_N = np.zeros(len(laid_out), dtype=bool)
        is_chosen_N[chosen_N] = True
        laid_out = laid_out[is_chosen_N[laid_out]]
    return _interleave(laid_out, num_streams)


def _interleave(laid_out: NDArray[np.int64], num_streams: int) -> NDArray[np.int64]:
    """Cut the sequences into streams, the first ones longer by one, and take one of each in turn."""
    num_longer, length = len(laid_out) % num_streams, len(laid_out) // num_streams
    result = np.empty_like(laid_out)
    start = 0
    for stream in range(num_streams):
        stop = start + length + (stream < num_longer)
        result[stream::num_streams] = laid_out[start:stop]
        start = stop
    return result


def generator_of(name: str) -> np.random.Generator:
    """Return a random generator that is seeded by ``name``."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
