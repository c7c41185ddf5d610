from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import epoch_order

counts = st.lists(st.integers(0, 20), max_size=20)


def starts_of(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


@given(counts, st.integers(0, 2**63), st.integers(0, 1000), st.integers(1, 8))
def test_every_sequence_exactly_once_and_always_the_same(sizes, seed, epoch, window):
    starts = starts_of(sizes)
    order = epoch_order(starts, seed, epoch, window, "fingerprint")
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    np.testing.assert_array_equal(order, epoch_order(starts.copy(), seed, epoch, window, "fingerprint"))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(0, 99), st.integers(1, 8))
def test_a_window_of_shards_is_left_before_the_next_begins(sizes, seed, window):
    starts = starts_of(sizes)
    shards = np.searchsorted(starts, epoch_order(starts, seed, 0, window), side="right") - 1
    seen: list[int] = []
    for shard in shards.tolist():
        if shard not in seen:
            seen.append(shard)
    window_of = {shard: number // window for number, shard in enumerate(seen)}
    visited = [window_of[shard] for shard in shards.tolist()]
    assert visited == sorted(visited)


def test_seed_epoch_and_fingerprint_each_change_the_order():
    starts = starts_of([30] * 9)
    orders = [
        epoch_order(starts, seed, epoch, 4, fingerprint)
        for seed in (0, 1)
        for epoch in (0, 1)
        for fingerprint in ("a", "b")
    ]
    assert len({order.tobytes() for order in orders}) == 8


def test_a_single_window_shuffles_everything():
    order = epoch_order(starts_of([50, 50]), 0, 0, 2)
    assert abs(np.mean(order[:50] < 50) - 0.5) < 0.3


def test_the_order_never_changes_between_versions():
    # A run that a later version resumes must go on in the same order.
    assert epoch_order(starts_of([3, 2, 4]), 7, 1, 2, "x").tolist() == [8, 1, 2, 0, 6, 5, 7, 4, 3]
