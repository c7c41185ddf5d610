from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import epoch_order

counts = st.lists(st.integers(0, 20), max_size=20)
streams = st.integers(1, 12)


def starts_of(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def streams_of(order: np.ndarray, num_streams: int) -> list[np.ndarray]:
    return [order[stream::num_streams] for stream in range(num_streams)]


@given(counts, st.integers(0, 2**63), st.integers(0, 1000), st.integers(1, 8), streams)
def test_every_sequence_exactly_once_and_always_the_same(sizes, seed, epoch, window, num_streams):
    starts = starts_of(sizes)
    order = epoch_order(starts, seed, epoch, window, "key", num_streams=num_streams)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    np.testing.assert_array_equal(
        order, epoch_order(starts.copy(), seed, epoch, window, "key", num_streams=num_streams)
    )


@given(counts, st.integers(0, 99), st.integers(1, 4), streams)
def test_streams_are_cut_from_what_one_stream_would_be(sizes, seed, window, num_streams):
    starts = starts_of(sizes)
    order = epoch_order(starts, seed, 0, window, num_streams=num_streams)
    whole = epoch_order(starts, seed, 0, window, num_streams=1)
    pieces = streams_of(order, num_streams)
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    lengths = [len(piece) for piece in pieces]
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(0, 99), st.integers(1, 8), streams)
def test_a_stream_leaves_a_window_of_shards_before_the_next_begins(sizes, seed, window, num_streams):
    starts = starts_of(sizes)
    order = epoch_order(starts, seed, 0, window, num_streams=num_streams)
    whole = np.searchsorted(starts, epoch_order(starts, seed, 0, window, num_streams=1), side="right") - 1
    seen = list(dict.fromkeys(whole.tolist()))
    window_of = {shard: number // window for number, shard in enumerate(seen)}
    for stream in streams_of(order, num_streams):
        visited = [window_of[shard] for shard in (np.searchsorted(starts, stream, side="right") - 1).tolist()]
        assert visited == sorted(visited)


@given(counts, st.integers(0, 99), st.integers(1, 4), streams, st.integers(1, 4))
def test_chosen_sequences_are_dealt_into_streams_too(sizes, seed, window, num_streams, nth):
    starts = starts_of(sizes)
    chosen = np.arange(0, sum(sizes), nth)
    order = epoch_order(starts, seed, 0, window, num_streams=num_streams, chosen_N=chosen)
    whole = epoch_order(starts, seed, 0, window, num_streams=1)
    np.testing.assert_array_equal(np.concatenate(streams_of(order, num_streams)), whole[whole % nth == 0])


def test_ranks_read_disjoint_shards_where_their_number_divides_the_streams():
    starts = starts_of([10] * 32)
    for num_ranks in (2, 4, 8):
        order = epoch_order(starts, 0, 0, 1, num_streams=8)
        shards = [set((order[rank::num_ranks] // 10).tolist()) for rank in range(num_ranks)]
        assert [len(mine) for mine in shards] == [32 // num_ranks] * num_ranks
        assert len(set.union(*shards)) == 32


def test_seed_epoch_and_key_each_change_the_order():
    starts = starts_of([30] * 9)
    orders = [epoch_order(starts, seed, epoch, 4, key) for seed in (0, 1) for epoch in (0, 1) for key in ("a", "b")]
    assert len({order.tobytes() for order in orders}) == 8


def test_every_batch_mixes_as_many_shards_as_there_are_streams():
    order = epoch_order(starts_of([50] * 8), 0, 0, 1, num_streams=8)
    assert all(len(set((batch // 50).tolist())) == 8 for batch in order.reshape(-1, 8))


def test_the_order_never_changes_between_versions():
    # A run that a later version resumes must go on in the same order.
    assert epoch_order(starts_of([3, 2, 4]), 7, 1, 2, "x", num_streams=1).tolist() == [8, 1, 2, 0, 6, 5, 7, 4, 3]
    assert epoch_order(starts_of([3, 2, 4]), 7, 1, 2, "x", num_streams=2).tolist() == [8, 5, 1, 7, 2, 4, 0, 3, 6]
