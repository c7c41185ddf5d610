"""Checks of stored numbers, made once for a shard when it is opened: a damaged or hostile cache must not give NaN.

Everything works on the arrays as they are stored, most of which are halves or bits of bfloat16: comparing bits is many
times as fast as comparing halves, which processors convert one by one. All raise ``CorruptCacheError`` with the array,
the first bad row and its value; callers add cache, shard, field and file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs.floats import FloatFormat
from kdcache.errors import CorruptCacheError

#: Rounding to half precision may put a log-probability so much above 0, and a mass so far from 1.
ROUNDING = 1e-3
#: Numbers that are looked at together: they and their copies fit into the processor's cache.
_BLOCK = 1 << 16


def check_below(values: NDArray[Any], limit: int, name: str, words: str) -> None:
    """Raise unless all (unsigned) ``values`` are below ``limit``; ``words`` say what ``limit`` is."""
    if values.size and int(values.max()) >= limit:
        raise bad_value(values, values >= limit, name, f"is not below {limit}, {words}")


def check_rows(wrong: NDArray[np.bool_], values: NDArray[Any], name: str, words: str) -> None:
    """Raise for the first of ``values`` that is ``wrong``; ``words`` go on after its value."""
    if wrong.any():
        raise bad_value(values, wrong, name, words)


def check_finite(values: NDArray[Any], stored: FloatFormat, name: str) -> None:
    """Raise unless all numbers, stored in the format ``stored``, are finite."""
    unsigned = np.dtype(f"uint{8 * values.itemsize}")
    infinity = stored.pack(np.array([np.inf], np.float32)).view(unsigned)[0]
    bits = values.ravel(order="K").view(unsigned)  # no copy: arrays come contiguous, by rows or by columns
    for start in range(0, len(bits), _BLOCK):
        if (bits[start : start + _BLOCK] & unsigned.type(np.iinfo(unsigned).max >> 1)).max() >= infinity:
            numbers = stored.unpack(values)
            raise bad_value(numbers, ~np.isfinite(numbers), name, "is not finite")


def check_logprobs(values: NDArray[Any], stored: FloatFormat, name: str, *, may_be_nan: bool = False) -> None:
    """Raise unless all numbers are at most 0, but for rounding; -inf is a log-probability, NaN only if it may be."""
    bits = values.ravel(order="K").view(f"int{8 * values.itemsize}")
    # As signed integers, -0 to -inf are the smallest, in this order; NaN and numbers above 0 come after them.
    if not bits.size or bits.max() <= stored.pack(np.array([-np.inf], np.float32)).view(bits.dtype)[0]:
        return
    numbers = stored.unpack(values)
    wrong = ~(numbers <= ROUNDING)
    check_rows(wrong & ~np.isnan(numbers) if may_be_nan else wrong, numbers, name, "is no log-probability")


def bad_value(values: NDArray[Any], wrong: NDArray[np.bool_], name: str, words: str) -> CorruptCacheError:
    """Return the error that names the first of ``values`` that is ``wrong``."""
    place = np.unravel_index(int(np.argmax(np.ascontiguousarray(wrong))), wrong.shape)
    row, *others = (int(number) for number in place)
    column = f", column {', '.join(map(str, others))}" if others else ""
    return CorruptCacheError(f"array {name}, row {row}{column}: {values[place]} {words}")
