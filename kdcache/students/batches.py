"""Which sequences an optimiser step trains on, and how they reach the device.

A *step* is the next S sequences of the epoch's order, S = sequences per micro-batch x gradient accumulation x ranks;
where the order comes from is none of this module's business (`kdcache.cache.order.Order`).
Only then is it dealt out: any split of the step into micro-batches and ranks sees the same sequences, none twice (the
usual sampler repeats sequences at an epoch's end to make ranks even), so the gradient does not depend on the split.
Inside a step sequences are grouped by length, which only saves padding. An order is a pure function of the epoch, so
the number of steps done is all that resuming has to know.

The last step of an epoch may be smaller. When it has fewer sequences than micro-batches, some micro-batches are
*empty*: they stand in with one sequence whose loss mask is 0, because every rank has to take part in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from kdcache.cache import Cache
from kdcache.cache.order import Order
from kdcache.schema import SequenceBatch
from kdcache.tasks.causal_lm import collate


class MicroBatches(BatchSampler):
    """The micro-batches of one rank, epoch by epoch, as lists of sequence numbers; set ``epoch`` before iterating."""

    def __init__(
        self,
        cache: Cache,
        order: Order,
        *,
        batch_sequences: int,
        accumulation: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.epoch = 0
        # What DataLoader and its friends look for on a batch sampler.
        self.batch_size = batch_sequences
        self.drop_last = False
        self._cache = cache
        self._order = order
        self._accumulation = accumulation
        self._rank = rank
        self.num_ranks = num_ranks

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch, over all ranks."""
        return self._order.num_sequences

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a full optimiser step, over all micro-batches and ranks."""
        return self.batch_size * self._accumulation * self.num_ranks

    @property
    def largest(self) -> int:
        """Sequences of the largest micro-batch, which has no more than its share of an epoch."""
        return -(-min(self.sequences_per_step, self.num_sequences) // (self._accumulation * self.num_ranks))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of as many sequences as an epoch has."""
        return -(-self.num_sequences // self.sequences_per_step)

    def __len__(self) -> int:
        return self.steps_per_epoch * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order.epoch(self.epoch)
        for start in range(0, len(order), self.sequences_per_step):
            yield from self._mine(order[start : start + self.sequences_per_step])

    def _mine(self, step: NDArray[np.int64]) -> Iterator[list[int]]:
        """Yield this rank's micro-batches of a step."""
        by_length = step[np.argsort(self._cache.lengths_N[step], kind="stable")]
        pieces = np.array_split(by_length, self._accumulation * self.num_ranks)
        for piece in pieces[self._rank :: self.num_ranks]:
            # Neighbours in a shard are decoded together.
            yield np.sort(piece).tolist()


class CacheDataset(Dataset[SequenceBatch]):
    """A cache as a data set whose items are read a micro-batch at a time, with the named fields of hidden states."""

    def __init__(self, cache: Cache, hidden: Sequence[str] = ()) -> None:
        self._cache = cache
        self._hidden = tuple(hidden)

    def __len__(self) -> int:
        return len(self._cache)

    def __getitems__(self, indices: list[int]) -> SequenceBatch:
        if indices:
            return self._cache.read(indices, hidden=self._hidden)
        stand_in = self._cache.read([int(self._cache.lengths_N.argmin())], hidden=self._hidden)
        stand_in.loss_mask_P = np.zeros_like(stand_in.loss_mask_P)
        return stand_in


def training_loader(
    cache: Cache,
    batches: MicroBatches | Sequence[list[int]],
    pad_id: int,
    num_workers: int = 0,
    *,
    hidden: Sequence[str] = (),
) -> DataLoader[Any]:
    """Return a loader of collated micro-batches as CPU tensors; ``hidden`` names further fields that they hold.

    ``num_workers`` is 0 by default: a decoded batch is larger than an encoded one, so sending it from another process
    costs more than decoding it.
    """
    dataset: Dataset[Any] = CacheDataset(cache, hidden)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(to_tensors, pad_id=pad_id),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def to_tensors(batch: SequenceBatch, pad_id: int) -> dict[str, Tensor]:
    """Collate decoded sequences into tensors (see ``kdcache.tasks.causal_lm.collate`` for names and shapes)."""
    # A view of an encoded array may be read-only, which torch.from_numpy only warns about.
    return {
        name: torch.from_numpy(np.require(value, requirements="W")) for name, value in collate(batch, pad_id).items()
    }
