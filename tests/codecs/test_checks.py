"""What may stand in stored arrays of numbers: the bits are compared, so every format is tried with every odd number."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.codecs.checks import check_finite, check_logprobs
from kdcache.codecs.floats import BF16, FP16, FP32
from kdcache.errors import CorruptCacheError
from tests.loops import loop

FORMATS = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
#: Numbers, and whether each is a log-probability, and whether it is finite.
NUMBERS = [
    (0.0, (True, True)),
    (-0.0, (True, True)),
    (-1e-7, (True, True)),
    (-3e4, (True, True)),
    (-np.inf, (True, False)),
    (5e-4, (True, True)),
    (2e-3, (False, True)),
    (1.0, (False, True)),
    (np.inf, (False, False)),
    (np.nan, (False, False)),
    (-np.nan, (False, False)),
]


@loop("name", list(FORMATS))
@loop(("number", "expected"), NUMBERS)
@loop("order", ["C", "F"])
def test_every_number_in_every_format(name, number, expected, order):
    stored = FORMATS[name]
    values = np.full((70_000, 2), -1.5, np.float32)
    values[69_999, 1] = number
    packed = np.asarray(stored.pack(values), order=order)
    for check, is_good in zip((check_logprobs, check_finite), expected, strict=True):
        if is_good:
            check(packed, stored, "a")
            continue
        with pytest.raises(CorruptCacheError, match="array a, row 69999, column 1: "):
            check(packed, stored, "a")
    if np.isnan(number):
        check_logprobs(packed, stored, "a", may_be_nan=True)


@loop("name", list(FORMATS))
def test_no_numbers(name):
    stored = FORMATS[name]
    empty = stored.pack(np.zeros((0, 3), np.float32))
    check_logprobs(empty, stored, "a")
    check_finite(empty, stored, "a")
