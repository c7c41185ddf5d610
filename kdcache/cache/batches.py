"""Which sequences a step trains on, and reading them ahead of their use.

A *step* is the next S samples of the epoch's order, S = sequences per micro-batch x micro-batches of a step x ranks;
where the order comes from is none of this module's business (`kdcache.cache.order.Order`). Rank r of R takes every R-th
sample of the step, which are whole streams of the order, groups them by length (which only saves padding) and cuts them
into its micro-batches. So any split of a step sees the same sequences, none twice: the usual sampler repeats sequences
at an epoch's end to make ranks even. What resuming has to know is the epoch and the next sample, whatever the split.

The last step of an epoch may be smaller. When it has fewer sequences than micro-batches, some micro-batches are
*empty*: they stand in with one sequence whose loss mask is 0, because every rank has to take part in every step.

Threads read ahead, since everything slow (decompression, checksums, decoding, the network) releases the interpreter's
lock; a worker process would have to send decoded batches, which are larger than encoded ones. Memory stays bounded by
the batches that are ready or under way.
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

    def read(self, indices: Iterable[int], *, hidden: Iterable[str] = (), top_k: int | None = None) -> SequenceBatch:
        """Read and decode sequences."""
        ...

    def prefetch(self, shards: Iterable[int], hidden: Iterable[str] = ()) -> None:
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
        """Sequences of an epoch, over all ranks."""
        return self._order.num_sequences

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a full optimiser step, over all micro-batches and ranks."""
        return self.batch_sequences * self.accumulation * self.num_ranks

    @property
    def largest(self) -> int:
        """Sequences of the largest micro-batch, which has no more than its share of an epoch."""
        return -(-min(self.sequences_per_step, self.num_sequences) // (self.accumulation * self.num_ranks))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of as many sequences as an epoch has."""
        return -(-self.num_sequences // self.sequences_per_step)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def steps(self, epoch: int, next_sample: int = 0) -> Iterator[list[list[int]]]:
        """Yield this rank's micro-batches of every step of ``epoch``, from its sample ``next_sample`` on."""
        order = self._order.epoch(epoch)
        for start in range(next_sample, len(order), self.sequences_per_step):
            yield self._mine(order[start : start + self.sequences_per_step])

    def mine(self, epoch: int, next_sample: int = 0) -> NDArray[np.int64]:
        """Return the sequences that this rank will read, in about the order of their use, [N]."""
        return self._order.epoch(epoch)[next_sample + self._rank :: self.num_ranks]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps(0):
            yield from step

    def _mine(self, step: NDArray[np.int64]) -> list[list[int]]:
        mine = step[self._rank :: self.num_ranks]
        # By what a model reads: the rows of a text may be one, whatever its length.
        by_length = mine[np.argsort(self._cache.sizes_N[mine], kind="stable")]
        # Neighbours in a shard are read together.
        return [np.sort(piece).tolist() for piece in np.array_split(by_length, self.accumulation)]


class Batches(Generic[T]):
    """Decoded micro-batches of one rank, epoch after epoch, read ahead by threads; make one with `Cache.batches`.

    Iterating gives the batches of one epoch; the next time those of the next epoch. ``make`` turns what was read into
    what is given out, in the thread that reads; ``threads=0`` reads when asked. At least as many batches are read
    ``ahead`` as there are ``threads``, or some would have nothing to do. ``state_dict()`` is taken over by
    ``load_state_dict()`` of any other object over the same texts, whatever its ranks and batch sizes. With several
    micro-batches in a step it names the first step that has not been given out completely.
    """

    def __init__(
        self,
        cache: Source,
        micro_batches: MicroBatches,
        *,
        make: Callable[[SequenceBatch], T],
        hidden: Sequence[str] = (),
        top_k: int | None = None,
        threads: int = 1,
        ahead: int = 2,
    ) -> None:
        self.micro_batches = micro_batches
        self.wait_s = 0.0
        """Seconds that whoever iterated has waited for data so far."""
        self._cache = cache
        self._make = make
        self._hidden = tuple(hidden)
        self._top_k = top_k
        self._threads = threads
        self._ahead = max(ahead, threads)
        self._epoch = 0
        self._next_sample = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.micro_batches)

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the next one, from its beginning, unless a state within it was loaded."""
        if epoch != self._epoch:
            self._epoch, self._next_sample, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Return where a run that has used every batch given out so far goes on."""
        return {"epoch": self._epoch, "next_sample": self._next_sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` says; raises ``ConfigError`` when it is none of this data."""
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
        """Give out an epoch: from the state that was loaded last, else from its beginning."""
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
            return self._make(self._cache.read(indices, hidden=self._hidden, top_k=self._top_k))
        shortest = int(self._cache.sizes_N.argmin())
        stand_in = self._cache.read([shortest], hidden=self._hidden, top_k=self._top_k)
        stand_in.loss_mask_P = np.zeros_like(stand_in.loss_mask_P)
        return self._make(stand_in)

    def _expect(self, epoch: int, start: int) -> None:
        shards = np.searchsorted(self._cache.shard_starts, self.micro_batches.mine(epoch, start), side="right") - 1
        firsts = np.unique(shards, return_index=True)[1]
        self._cache.prefetch(shards[np.sort(firsts)].tolist(), self._hidden)


def read_ahead(
    wanted: Iterable[R], read: Callable[[R], T], *, threads: int = 1, ahead: int = 2
) -> Iterator[tuple[T, float]]:
    """Yield ``read(item)`` of every item, in order, and the seconds that the caller waited for it.

    At most ``ahead`` results are ready or under way beside the one that was given out. An error of ``read`` comes out
    where its result would have.
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
        # Of an iteration that was left early: nobody waits for what is under way.
        pool.shutdown(wait=False, cancel_futures=True)
