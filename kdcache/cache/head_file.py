"""The LM head of a cache as a file: safetensors, whose header is checked before anything else reads it.

The file may be a stranger's, and ``verify`` must judge it without torch. Its header says where tensors lie and of what
shape they are; all of it is compared with the file and with what the cache needs, then every number is looked at.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs.checks import check_finite
from kdcache.codecs.floats import BF16, FP16, FP32, FloatFormat
from kdcache.errors import CorruptCacheError, shortened
from kdcache.schema import Manifest

#: Most bytes of the header; that of an LM head has some hundred.
_MAX_HEADER = 1 << 20
#: Formats of the numbers; float64 is checked as what it is.
_FORMATS: dict[str, FloatFormat | None] = {"F32": FP32, "F16": FP16, "BF16": BF16, "F64": None}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_MEMBERS = {"dtype", "shape", "data_offsets"}


def check_head(data: bytes, manifest: Manifest | None = None) -> None:
    """Raise ``CorruptCacheError`` unless ``data`` are an LM head, for targets of ``manifest`` where that is given."""
    try:
        _check(data, manifest)
    except CorruptCacheError as error:
        raise CorruptCacheError(f"the teacher's LM head cannot be used: {error}") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise CorruptCacheError(f"the teacher's LM head cannot be read: {shortened(repr(error), 300)}") from None


def _check(data: bytes, manifest: Manifest | None) -> None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + length])
    settings = json.loads(header.pop("__metadata__")["lm_head"])
    _check_settings(settings)
    tensors = {name: header[name] for name in header if name in ("weight", "bias")}
    if len(tensors) < len(header) or "weight" not in tensors:
        raise ValueError(f"the tensors {sorted(header)}, expected weight and perhaps bias")
    arrays = {name: _array(data[8 + length :], name, about) for name, about in tensors.items()}
    shape, dtype = tensors["weight"]["shape"], tensors["weight"]["dtype"]
    if len(shape) != 2 or 0 in shape:
        raise CorruptCacheError(f"expected weights of two dimensions, found the shape {shape}")
    if "bias" in tensors and (tensors["bias"]["shape"], tensors["bias"]["dtype"]) != (shape[:1], dtype):
        about = tensors["bias"]
        raise CorruptCacheError(f"the bias is {about['dtype']} {about['shape']} beside weights of {dtype} {shape}")
    if manifest is not None:
        expected = [manifest.tokenizer.vocab_size, *_widths(manifest)]
        if shape != expected:
            raise CorruptCacheError(f"weights of the shape {shape}, the cache needs {expected}")
    _check_numbers(arrays["weight"], dtype, "weight", tensors["weight"]["shape"])
    if "bias" in arrays:  # a teacher may exclude an id by a bias of -inf
        bias_V = _as_floats(arrays["bias"], dtype)
        if not (bias_V < math.inf).all():
            raise CorruptCacheError(f"it is not finite: array bias, row {int(np.argmin(bias_V < math.inf))}")


def _check_settings(settings: dict[str, Any]) -> None:
    scale, cap = settings["scale"], settings["softcap"]
    for name, value in (("scale", scale), ("softcap", cap)):
        if isinstance(value, bool) or not (isinstance(value, int | float) or (value is None and name == "softcap")):
            raise CorruptCacheError(f"its {name} is {shortened(value)}, expected a number")
    if not math.isfinite(float(scale)) or scale == 0:
        raise CorruptCacheError(f"its scale is {float(scale):g}")
    if cap is not None and not 0 < float(cap) < math.inf:
        raise CorruptCacheError(f"its soft cap is {cap}, expected a number above 0")


def _array(body: bytes, name: str, about: dict[str, Any]) -> NDArray[Any]:
    """Return the bytes of a tensor as unsigned numbers of its size."""
    if about.keys() != _MEMBERS:
        raise ValueError(f"{name} is described by {sorted(about)}")
    if about["dtype"] not in _ITEM_BYTES:
        raise CorruptCacheError(f"expected weights of {', '.join(_ITEM_BYTES)}, found {shortened(about['dtype'])}")
    begin, end = about["data_offsets"]
    sizes, itemsize = about["shape"], _ITEM_BYTES[about["dtype"]]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *sizes)):
        raise ValueError(f"{name} has the shape {shortened(sizes)} at {begin} to {end}")
    if end > len(body) or end - begin != math.prod(sizes) * itemsize:
        raise ValueError(f"{name} of the shape {shortened(sizes)} lies at {begin} to {end} of {len(body)} bytes")
    return np.frombuffer(body, f"<u{itemsize}", (end - begin) // itemsize, begin)


def _check_numbers(bits: NDArray[Any], dtype: str, name: str, shape: list[int]) -> None:
    stored = _FORMATS[dtype]
    try:
        if stored is not None:
            check_finite(bits.view(stored.dtype).reshape(shape), stored, name)
        elif not np.isfinite(bits.view(np.float64)).all():
            raise CorruptCacheError(f"array {name}")
    except CorruptCacheError as error:
        raise CorruptCacheError(f"it is not finite: {error}") from None


def _as_floats(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    stored = _FORMATS[dtype]
    return bits.view(np.float64) if stored is None else stored.unpack(bits.view(stored.dtype))


def _widths(manifest: Manifest) -> list[int]:
    arrays = manifest.field(manifest.states_field).arrays
    return [size for array in arrays if array.name == "states" for size in array.shape]
