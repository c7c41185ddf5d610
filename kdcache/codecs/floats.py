"""Ways to store float32 numbers: as they are, in half precision, and in bfloat16, which neither numpy nor Zarr v3 has.

A bfloat16 is the upper 16 bits of a float32, rounded to nearest even, and is stored as those bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAN = 0x7FC0


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bfloat16 bits of ``values``, any shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adding half a unit (less one when the kept part is even) before truncating rounds to nearest even.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    # The addition would carry a NaN's payload into its exponent and make it infinity or even 0.
    rounded[np.isnan(values)] = _NAN
    return rounded


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 ``bits``."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to(dtype: str) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda values: values.astype(dtype)


@dataclass(frozen=True)
class FloatFormat:
    """A dtype of stored arrays, and the way there from float32 and back."""

    dtype: str
    pack: Callable[[NDArray[np.float32]], NDArray[Any]]
    unpack: Callable[[NDArray[Any]], NDArray[np.float32]]


def format_of(dtype: str) -> FloatFormat:
    """Return the format of numbers that are stored as floats of ``dtype``, float16 or float32."""
    return FP16 if dtype == FP16.dtype else FP32


BF16 = FloatFormat("uint16", to_bfloat16, from_bfloat16)
FP16 = FloatFormat("float16", _to("float16"), _to("float32"))
FP32 = FloatFormat("float32", _to("float32"), _to("float32"))
