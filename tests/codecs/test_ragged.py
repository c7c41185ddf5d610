from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs.ragged import expand, flatten
from kdcache.errors import CorruptCacheError
from tests.loops import loop


@given(st.data(), st.integers(0, 20), st.integers(0, 7))
def test_expanding_undoes_flattening(data, num_rows, width):
    lengths = np.array(data.draw(st.lists(st.integers(0, width), min_size=num_rows, max_size=num_rows)), np.uint8)
    values = np.arange(1, num_rows * width + 1, dtype=np.uint16).reshape(num_rows, width)
    flat = flatten(values, lengths)
    assert len(flat) == lengths.sum()
    assert flat.dtype == values.dtype
    expanded = expand(flat, lengths, width, "x")
    np.testing.assert_array_equal(expanded, np.where(np.arange(width) < lengths[:, None], values, 0))
    assert expanded.T.flags.c_contiguous  # decoders work column by column


def test_entries_stand_column_by_column():
    values = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert flatten(values, np.array([2, 1, 3])).tolist() == [1, 4, 7, 2, 8, 9]


def test_lengths_are_not_added_up_in_their_own_dtype():
    lengths = np.full(300, 255, np.uint8)
    values = np.zeros((300, 255), np.uint8)
    assert expand(flatten(values, lengths), lengths, 255, "x").shape == (300, 255)


@loop(
    ("lengths", "num_entries", "words"),
    [
        ([2, 1], 4, "x has 4 entries for rows of 3"),
        ([2, 1], 2, "x has 2 entries for rows of 3"),
        ([4, 0], 4, "the longest 4, at most 3"),
        ([0, 0], 1, "x has 1 entries for rows of 0"),
        ([], 1, "x has 1 entries for rows of 0"),
    ],
)
def test_lengths_that_contradict_the_entries(lengths, num_entries, words):
    with pytest.raises(CorruptCacheError, match=words):
        expand(np.zeros(num_entries, np.uint8), np.array(lengths, np.uint8), 3, "x")
