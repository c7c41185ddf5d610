"""Batches of a cache: the same global batches for any number of ranks, and state that any of them takes over."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import open_cache
from kdcache.cache.batches import Batches, MicroBatches, read_ahead
from kdcache.cache.order import ShuffledOrder
from kdcache.errors import ConfigError, CorruptCacheError
from tests.loops import loop


class Sizes(SimpleNamespace):
    """A cache as far as dealing out sequences looks at it, whose sequences read as their own numbers."""

    def __init__(self, sizes, seed=0):
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        lengths = np.random.default_rng(seed).integers(1, 50, int(starts[-1]))
        super().__init__(shard_starts=starts, sizes_N=lengths, expected=[])

    def read(self, indices, fields=(), top_k=None):
        return SimpleNamespace(indices=list(indices), loss_mask_P=np.ones(1))

    def prefetch(self, shards, fields):
        self.expected.append(shards)


def batches_of(cache, *, batch, accumulation=1, rank=0, num_ranks=1, num_streams=8, window=1, seed=0, **reading):
    order = ShuffledOrder(cache.shard_starts, seed, window, "key", num_streams=num_streams)
    dealt = MicroBatches(cache, order, batch_sequences=batch, accumulation=accumulation, rank=rank, num_ranks=num_ranks)
    # A stand-in's loss mask is 0: it counts for nothing.
    reading = {"make": lambda read: read.indices if read.loss_mask_P.any() else [], "threads": 0} | reading
    return Batches(cache, dealt, **reading)


def take(loaders, num_steps):
    """Give out steps from every rank's loader; return the sequences of each step, and the ranks' states."""
    iterators = [iter(loader) for loader in loaders]
    steps = []
    for _ in range(num_steps):
        step = []
        for loader, iterator in zip(loaders, iterators, strict=True):
            for _ in range(loader.micro_batches.accumulation):
                step += next(iterator)
        steps.append(sorted(step))
    return steps, [loader.state_dict() for loader in loaders]


splits = st.sampled_from([(8, 1, 1), (4, 2, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 2, 4), (1, 1, 8)])


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum),
    seed=st.integers(0, 99),
    window=st.integers(1, 4),
    num_streams=st.integers(1, 12),
    legs=st.lists(st.tuples(splits, st.integers(0, 9)), min_size=1, max_size=4),
)
def test_runs_go_on_anywhere_onto_any_number_of_ranks(sizes, seed, window, num_streams, legs):
    cache = Sizes(sizes)
    how = {"num_streams": num_streams, "window": window, "seed": seed}
    num_steps = -(-sum(sizes) // 8)
    plain = batches_of(cache, batch=8, **how)
    expected = [sorted(batch) for _ in range(3) for batch in plain]
    assert sorted(n for step in expected[:num_steps] for n in step) == list(range(sum(sizes))), "each exactly once"

    done, state = [], {"epoch": 0, "next_sample": 0}
    for (batch, accumulation, num_ranks), wanted in legs:
        split = {"batch": batch, "accumulation": accumulation, "num_ranks": num_ranks}
        loaders = [batches_of(cache, **split, rank=rank, **how) for rank in range(num_ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        left = num_steps - len(done) % num_steps  # as far as the epoch's end, at most
        steps, states = take(loaders, min(wanted, left))
        assert all(other == states[0] for other in states)
        done, state = done + steps, states[0]
        if len(done) > 2 * num_steps:
            break
    assert done == expected[: len(done)]
    assert state == {"epoch": len(done) // num_steps, "next_sample": len(done) % num_steps * 8}


def test_the_state_is_all_that_a_run_needs_twice_in_a_row_and_at_an_epochs_end():
    cache = Sizes([10, 7, 5])
    loader = batches_of(cache, batch=4)
    whole = [list(loader), list(loader)]
    for first, second in [(0, 0), (2, 1), (5, 0), (3, 2), (6, 0), (6, 3)]:
        one = batches_of(cache, batch=4)
        begun = [next(it) for it in [iter(one)] for _ in range(first)]
        two = batches_of(cache, batch=4)
        two.load_state_dict(one.state_dict())
        begun += [next(it) for it in [iter(two)] for _ in range(second)]
        three = batches_of(cache, batch=4)
        three.load_state_dict(two.state_dict())
        rest = list(three)
        assert begun + rest == (whole[0] if first < 6 else whole[0] + whole[1])


def test_an_iteration_that_is_left_begins_its_epoch_again_and_a_finished_one_the_next():
    loader = batches_of(Sizes([10, 7]), batch=4)
    first = next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "next_sample": 4}
    epoch = list(loader)
    assert epoch[0] == first
    assert loader.state_dict() == {"epoch": 1, "next_sample": 0}
    assert list(loader) != epoch
    loader.set_epoch(0)
    assert list(loader) == epoch
    assert len(loader) == len(epoch)


def test_a_step_that_is_not_complete_is_given_out_again():
    loader = batches_of(Sizes([12]), batch=2, accumulation=3)
    iterator = iter(loader)
    for done in (0, 0, 6, 6, 6, 12):
        next(iterator)
        assert loader.state_dict() == (
            {"epoch": 0, "next_sample": done} if done < 12 else {"epoch": 1, "next_sample": 0}
        )


@loop(
    "state",
    [
        {},
        {"epoch": 0},
        {"epoch": -1, "next_sample": 0},
        {"epoch": 0, "next_sample": 18},
        {"epoch": 0.5, "next_sample": 0},
    ],
)
def test_a_state_of_other_data_is_refused(state):
    with pytest.raises(
        ConfigError,
        match=r"loader state \{.*\} does not match this data set of 17 sequences: .* next_sample from 0 to 17",
    ):
        batches_of(Sizes([10, 7]), batch=4).load_state_dict(state)


def test_bad_splits_are_refused():
    with pytest.raises(ConfigError, match="batch_sequences is 0"):
        batches_of(Sizes([4]), batch=0)
    with pytest.raises(ConfigError, match=r"there is no rank 2 among 2 \(0 to 1\)"):
        batches_of(Sizes([4]), batch=1, rank=2, num_ranks=2)
    with pytest.raises(ConfigError, match="num_streams is -1, expected at least 1"):
        batches_of(Sizes([4]), batch=1, num_streams=-1)
    with pytest.raises(ConfigError, match="shuffle_window is 0, expected at least 1"):
        batches_of(Sizes([4]), batch=1, window=0)


def test_the_reader_is_told_of_this_ranks_shards_in_the_order_of_their_use():
    cache = Sizes([8] * 16)
    told = []
    for rank in range(4):
        loader = batches_of(cache, batch=2, rank=rank, num_ranks=4)
        used = dict.fromkeys((np.searchsorted(cache.shard_starts, n, side="right") - 1) for b in loader for n in b)
        told.append(cache.expected.pop())
        assert set(told[-1]) == set(used)
        assert set(told[-1][:2]) == set(list(used)[:2])
    assert sorted(n for shards in told for n in shards) == list(range(16)), "each rank reads its own share"


# ------------------------------------------------------------------------------------------------- reading ahead


@loop(("threads", "ahead"), [(0, 2), (1, 1), (1, 4), (3, 2)])
def test_results_come_in_order_and_no_more_than_allowed_is_read_ahead(threads, ahead):
    started, given_out, lock, most = [], [0], threading.Lock(), [0]

    def read(n):
        with lock:
            started.append(n)
            most[0] = max(most[0], len(started) - given_out[0])
        time.sleep(0.001 * (n % 3))
        return n * n

    for n, (result, seconds) in enumerate(read_ahead(range(30), read, threads=threads, ahead=ahead)):
        given_out[0] = n + 1
        assert result == n * n
        assert seconds >= 0
    assert n == 29
    assert most[0] <= (ahead + 1 if threads else 1)


def test_an_error_comes_where_its_result_would_have():
    def read(n):
        if n == 3:
            raise CorruptCacheError("shard 3 is damaged")
        return n

    seen = []
    results = read_ahead(range(10), read, threads=2, ahead=4)
    for _ in range(3):
        seen.append(next(results)[0])
    with pytest.raises(CorruptCacheError, match="shard 3"):
        next(results)
    assert seen == [0, 1, 2]


def test_leaving_early_stops_the_threads():
    before = threading.active_count()
    reader = read_ahead(range(1000), lambda n: n, threads=2, ahead=2)
    next(reader)
    reader.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_waiting_is_counted():
    loader = batches_of(Sizes([8]), batch=4, threads=1, make=lambda read: time.sleep(0.1) or read)
    list(loader)
    assert loader.wait_s > 0.015


def test_every_thread_has_a_batch_to_read():
    all_at_once = threading.Barrier(4)
    loader = batches_of(Sizes([8]), batch=2, threads=4, make=lambda read: all_at_once.wait(10))
    assert sorted(loader) == [0, 1, 2, 3]


def test_batches_of_a_cache(sound):
    cache = open_cache(str(sound))
    loader = cache.batches(4, seed=3, fields=["hidden-1"])
    seen = [n for batch in loader for n in batch.indices]
    assert sorted(seen) == list(range(len(cache)))
    batch = next(iter(loader))
    np.testing.assert_array_equal(
        batch.hidden["hidden-1"], cache.read(batch.indices, fields=["hidden-1"]).hidden["hidden-1"]
    )
    assert next(iter(cache.batches(5, shuffle=False))).indices == [0, 1, 2, 3, 4]
    chosen = [n for batch in cache.batches(2, where="num_positions > 6") for n in batch.indices]
    assert sorted(chosen) == np.flatnonzero(cache.lengths_N > 6).tolist()
    halves = [b for rank in range(2) for b in cache.batches(2, rank=rank, num_ranks=2)]
    assert {n for b in halves for n in b.indices} == set(range(len(cache)))
    assert len(halves) == 2 * len(cache.batches(2, num_ranks=2)), "ranks take as many steps, with stand-ins at the end"


def test_micro_batches_are_alike_in_what_a_model_reads(task_caches):
    """A text has one row, whatever its length."""
    cache = open_cache(str(task_caches["sequence-classification"]))
    assert set(cache.lengths_N.tolist()) == {1}
    order = ShuffledOrder(cache.shard_starts, 0, 1, "key", num_streams=2)
    first, second = next(MicroBatches(cache, order, batch_sequences=len(cache) // 2, accumulation=2).steps(0))
    assert cache.sizes_N[first].max() <= cache.sizes_N[second].min()
    assert cache.sizes_N[first].min() < cache.sizes_N[second].max()
