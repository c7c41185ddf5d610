from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs.floats import from_bfloat16, to_bfloat16


def of_torch(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def test_same_bits_as_torch_over_the_whole_range():
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    # Every rounding case: exactly half way, one below and one above, over even and odd.
    halves = (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] + np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)
    values = np.concatenate([bits, halves.reshape(-1)]).view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(to_bfloat16(values), of_torch(values))


@given(st.floats(width=32, allow_nan=False))
def test_same_bits_as_torch(value):
    values = np.array([value], np.float32)
    np.testing.assert_array_equal(to_bfloat16(values), of_torch(values))


def test_every_bfloat16_comes_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = from_bfloat16(bits)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(to_bfloat16(values)[finite], bits[finite])


def test_nan_stays_nan():
    values = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(from_bfloat16(to_bfloat16(values))).all()


def test_any_shape_and_stride():
    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    np.testing.assert_array_equal(to_bfloat16(values.T), of_torch(np.ascontiguousarray(values.T)))
    assert to_bfloat16(np.empty((0, 3), np.float32)).shape == (0, 3)
