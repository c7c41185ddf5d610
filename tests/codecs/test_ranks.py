from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs.ids import id_dtype, ids_of_ranks, rank_ids, sorted_steps, undo_sorted_steps
from kdcache.errors import CorruptCacheError
from tests.loops import loop

ids_of_some_size = st.sampled_from([1, 7, 300, 65_536, 65_537, 262_144]).flatmap(
    lambda size: st.tuples(st.just(size), st.lists(st.integers(0, size - 1), max_size=200))
)


@given(ids_of_some_size)
def test_ranks_lead_back_to_their_ids(case):
    vocab_size, drawn = case
    ids = np.array(drawn, np.int64)
    ranks_V, table = rank_ids(ids, vocab_size)
    assert ranks_V.dtype == table.dtype == id_dtype(vocab_size)
    assert len(table) == len(set(drawn))
    found = ids_of_ranks(ranks_V[ids], table, "x")
    assert found.dtype == table.dtype
    np.testing.assert_array_equal(found, ids)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=400))
def test_frequent_ids_come_first_and_similar_ones_in_ascending_order(drawn):
    _, table = rank_ids(np.array(drawn), 21)
    ids = ids_of_ranks(np.arange(len(table)), table, "x").tolist()
    counts = [drawn.count(i) for i in ids]
    classes = [int(np.floor(2 * np.log2(count))) for count in counts]
    assert classes == sorted(classes, reverse=True)
    for number in set(classes):
        same = [i for i, c in zip(ids, classes, strict=True) if c == number]
        assert same == sorted(same)


def test_counts_within_half_a_doubling_are_one_class():
    ids = np.repeat([9, 3, 1, 8], [7, 6, 5, 100])
    _, table = rank_ids(ids, 10)
    assert ids_of_ranks(np.arange(4), table, "x").tolist() == [8, 3, 9, 1]


def test_ids_of_any_shape():
    ids = np.array([[3, 1], [3, 2]])
    ranks_V, table = rank_ids(ids, 5)
    np.testing.assert_array_equal(ids_of_ranks(ranks_V[ids], table, "x"), ids)


def test_a_table_whose_differences_are_negative_wraps_around():
    ids = np.array([60_000] * 9 + [3])  # the frequent one first, so the next difference is below 0
    ranks_V, table = rank_ids(ids, 65_536)
    assert table.tolist() == [60_000, 3 - 60_000 + 65_536]
    np.testing.assert_array_equal(ids_of_ranks(ranks_V[ids], table, "x"), ids)


@loop("table", [[], [5], [5, 1]])
def test_a_rank_outside_the_table(table):
    with pytest.raises(CorruptCacheError, match=f"a rank is 2, but x has {len(table)} entries"):
        ids_of_ranks(np.array([0, 2], np.uint16), np.array(table, np.uint16), "x")


def test_no_ranks_need_no_table():
    assert ids_of_ranks(np.zeros((0, 3), np.uint16), np.zeros(0, np.uint32), "x").shape == (0, 3)


@given(st.integers(0, 6), st.integers(1, 8), st.integers(0, 2**31), st.sampled_from(["uint16", "uint32"]))
def test_steps_are_undone(num_rows, width, seed, dtype):
    generator = np.random.default_rng(seed)
    ranks = generator.integers(0, np.iinfo(dtype).max, (num_rows, width), endpoint=True).astype(dtype)
    same = generator.random((num_rows, width)) < 0.5
    same[:, 0] = False
    steps = sorted_steps(ranks, same)
    assert steps.dtype == dtype
    np.testing.assert_array_equal(undo_sorted_steps(steps.T, same.T).T, ranks)


def test_sorted_neighbours_become_small_numbers():
    ranks = np.array([[500, 7, 9, 10, 3]], np.uint16)
    same = np.array([[False, False, True, True, False]])
    assert sorted_steps(ranks, same).tolist() == [[500, 7, 2, 1, 3]]
    assert ranks.tolist() == [[500, 7, 9, 10, 3]]


def test_undoing_the_steps_of_no_columns():
    assert undo_sorted_steps(np.zeros((0, 4), np.uint16), np.zeros((0, 4), bool)).shape == (0, 4)
