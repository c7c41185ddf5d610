"""The order of training, as a pure function of (key, seed, epoch): nothing to save, nothing to drift.

Shards are permuted, cut into windows of a few shards, and sequences are shuffled inside each window. The list that
this gives is cut into *canonical streams* of equal length, and an epoch takes one sequence from each in turn: sample g
of the epoch is number ``g // num_streams`` of stream ``g % num_streams``. So

- every batch mixes as many places of the cache as there are streams, while a reader keeps only
  ``num_streams x window_shards`` shards in memory;
- rank r of R takes the samples ``g = r (mod R)``. Where R divides the number of streams, these are whole streams, and
  a rank reads only its share of the shards; for any other R all is right as well, but ranks read shards in common;
- the order knows nothing of ranks, so a run goes on with another number of them, and resuming needs no more than
  "epoch e, sample g".

An `Order` is all that dealing out batches knows about it. `ShuffledOrder` is the plain one; the other one follows a
curriculum (`kdcache.cache.curriculum`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError

#: Canonical streams of an epoch, if nobody says otherwise: so many ranks read disjoint shards.
NUM_STREAMS = 8


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

    Raises ``ConfigError`` for no streams, and for windows of no shards.
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
    """The sequences as they are stored, every epoch the same; ``chosen_N`` [N] are those that take part."""

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

    ``shard_starts`` [num_shards + 1] are the first sequence of every shard and the total; ``chosen_N`` the sequences
    that take part (None: all).
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
    """Return the random numbers that belong to ``name``."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
