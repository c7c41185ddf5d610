"""Split the steps of training into micro-batches, and read them ahead of their use.

A *step* is the next S samples of the epoch's order (see `kdcache.cache.order`), S = sequences per micro-batch x
micro-batches of a step x ranks. Rank r of R takes every R-th sample of the step, which are whole streams of the order,
groups them by length (which only saves padding) and cuts them into its micro-batches. So a step has the same sequences
however it is split, and none twice; the usual distributed sampler repeats sequences at the end of an epoch to give all
ranks the same number. To resume, only the epoch and the next sample are needed, whatever the split.

The last step of an epoch may be smaller. If it has fewer sequences than micro-batches, some micro-batches are *empty*:
they contain one sequence whose loss mask is 0, because every rank has to take part in every step.

Threads read ahead, because everything slow (decompression, checksums, decoding, the network) releases the global
interpreter lock. Worker processes would have to send decoded batches, which are larger than encoded ones. Memory is
bounded by the batches that are ready or being read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.order import Order
from kdcache.errors import ConfigError
from kdcache.schema import SequenceBatch

T = TypeVar("T")
R = TypeVar("R")


class Source(Protocol):
    """What batches need of an open cache: `kdcache.cache.reader.Cache` has it."""

    shard_starts: NDArray[np.int64]

    @property
    def sizes_N(self) -> NDArray[np.int64]:
        """About how many tokens of every sequence a model reads, [N]."""
        ...

    def read(self, indices: Iterable[int], *, fields: Iterable[str] = (), top_k: int | None = None) -> SequenceBatch:
        """Read and decode sequences."""
        ...

    def prefetch(self, shards: Iterable[int], fields: Iterable[str] = ()) -> None:
        """Download shards in the background, in the order of their first use."""
        ...


class MicroBatches:
    """The micro-batches of one rank as lists of sequence numbers."""

    def __init__(
        self,
        cache: Source,
        order: Order,
        *,
        batch_sequences: int,
        accumulation: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        for name, value in (("batch_sequences", batch_sequences), ("accumulation", accumulation)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"there is no rank {rank} among {num_ranks} (0 to {num_ranks - 1})")
        self.batch_sequences = batch_sequences
        self.accumulation = accumulation
        self.num_ranks = num_ranks
        self._cache = cache
        self._order = order
        self._rank = rank

    @property
    def num_sequences(self) -> int:
        """Number of sequences in an epoch, over all ranks."""
        return self._order.num_sequences

    @property
    def sequences_per_step(self) -> int:
        """Number of sequences in a full optimiser step, over all micro-batches and ranks."""
        return self.batch_sequences * self.accumulation * self.num_ranks

    @property
    def largest(self) -> int:
        """Number of sequences in the largest micro-batch, at most its share of an epoch."""
        return -(-min(self.sequences_per_step, self.num_sequences) // (self.accumulation * self.num_ranks))

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps in an epoch."""
        return -(-self.num_sequences // self.sequences_per_step)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def steps(self, epoch: int, next_sample: int = 0) -> Iterator[list[list[int]]]:
        """Yield this rank's micro-batches of every step of ``epoch``, starting at sample ``next_sample``."""
        order = self._order.epoch(epoch)
        for start in range(next_sample, len(order), self.sequences_per_step):
            yield self._mine(order[start : start + self.sequences_per_step])

    def mine(self, epoch: int, next_sample: int = 0) -> NDArray[np.int64]:
        """Return the sequences that this rank will read, approximately in the order of their use, [N]."""
        return self._order.epoch(epoch)[next_sample + self._rank :: self.num_ranks]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps(0):
            yield from step

    def _mine(self, step: NDArray[np.int64]) -> list[list[int]]:
        mine = step[self._rank :: self.num_ranks]
        # By tokens, because a long text may have a single position.
        by_length = mine[np.argsort(self._cache.sizes_N[mine], kind="stable")]
        # Neighbours in a shard are read together.
        return [np.sort(piece).tolist() for piece in np.array_split(by_length, self.accumulation)]


class Batches(Generic[T]):
    """Decoded micro-batches of one rank, epoch after epoch, read ahead by threads; make one with `Cache.batches`.

    Each iteration yields the batches of one epoch, the next iteration those of the next epoch. ``make`` converts each
    batch, in the thread that reads it. With ``threads=0`` batches are read when they are requested. At least as many
    batches are read ``ahead`` as there are ``threads``. ``load_state_dict()`` accepts the ``state_dict()`` of any other
    object over the same texts, with any number of ranks and any batch size. With several micro-batches in a step, the
    state is that of the first step that was not yielded completely.
    """

    def __init__(
        self,
        cache: Source,
        micro_batches: MicroBatches,
        *,
        make: Callable[[SequenceBatch], T],
        fields: Sequence[str] = (),
        top_k: int | None = None,
        threads: int = 1,
        ahead: int = 2,
    ) -> None:
        self.micro_batches = micro_batches
        self.wait_s = 0.0
        """Seconds that the caller has waited for data so far."""
        self._cache = cache
        self._make = make
        self._fields = tuple(fields)
        self._top_k = top_k
        self._threads = threads
        self._ahead = max(ahead, threads)
        self._epoch = 0
        self._next_sample = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.micro_batches)

    def set_epoch(self, epoch: int) -> None:
        """Continue with the beginning of ``epoch``, unless a state within that epoch was loaded."""
        if epoch != self._epoch:
            self._epoch, self._next_sample, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Return the state from which a run resumes that has used every batch yielded so far."""
        return {"epoch": self._epoch, "next_sample": self._next_sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``; raises ``ConfigError`` when it does not match this data set."""
        epoch, sample = state.get("epoch"), state.get("next_sample")
        most = self.micro_batches.num_sequences
        if not (isinstance(epoch, int) and isinstance(sample, int) and epoch >= 0 and 0 <= sample <= most):
            raise ConfigError(
                f"loader state {dict(state)} does not match this data set of {most} sequences: expected an epoch of at "
                f"least 0 and a next_sample from 0 to {most}; load the state of a run over the same sequences"
            )
        self._epoch, self._next_sample = (epoch + 1, 0) if sample == most else (epoch, sample)
        self._start = self._next_sample

    def __iter__(self) -> Iterator[T]:
        """Yield an epoch: from the state that was loaded last, else from its beginning."""
        epoch, start, self._start = self._epoch, self._start, 0
        self._next_sample = start
        self._expect(epoch, start)
        dealt = self.micro_batches
        lists = (indices for step in dealt.steps(epoch, start) for indices in step)
        batches = read_ahead(lists, self._read, threads=self._threads, ahead=self._ahead)
        for number, (batch, seconds) in enumerate(batches, 1):
            self.wait_s += seconds
            if number % dealt.accumulation == 0:
                done = start + number // dealt.accumulation * dealt.sequences_per_step
                self._epoch, self._next_sample = (epoch, done) if done < dealt.num_sequences else (epoch + 1, 0)
            yield batch

    def _read(self, indices: list[int]) -> T:
        if indices:
            return self._make(self._cache.read(indices, fields=self._fields, top_k=self._top_k))
        shortest = int(self._cache.sizes_N.argmin())
        stand_in = self._cache.read([shortest], fields=self._fields, top_k=self._top_k)
        stand_in.loss_mask_P = np.zeros_like(stand_in.loss_mask_P)
        return self._make(stand_in)

    def _expect(self, epoch: int, start: int) -> None:
        shards = np.searchsorted(self._cache.shard_starts, self.micro_batches.mine(epoch, start), side="right") - 1
        firsts = np.unique(shards, return_index=True)[1]
        self._cache.prefetch(shards[np.sort(firsts)].tolist(), self._fields)


def read_ahead(
    wanted: Iterable[R], read: Callable[[R], T], *, threads: int = 1, ahead: int = 2
) -> Iterator[tuple[T, float]]:
    """Yield ``read(item)`` of every item, in order, and the seconds that the caller waited for it.

    At most ``ahead`` results are ready or being read in addition to the one that was yielded last. An error of ``read``
    is raised in place of its result.
    """
    items = iter(wanted)
    if threads < 1:
        for item in items:
            began_s = time.perf_counter()
            result = read(item)
            yield result, time.perf_counter() - began_s
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kdcache-read")
    try:
        began_s = time.perf_counter()
        pending: deque[Future[T]] = deque(pool.submit(read, item) for item in islice(items, max(ahead, 1)))
        while pending:
            result = pending.popleft().result()
            seconds = time.perf_counter() - began_s
            pending.extend(pool.submit(read, item) for item in islice(items, 1))
            yield result, seconds
            began_s = time.perf_counter()
    finally:
        # If the iteration was left early, do not wait for reads in progress.
        pool.shutdown(wait=False, cancel_futures=True)
