"""Codecs of vectors, such as hidden states: float32 [P, D] in, integer or half-precision arrays out.

bf16 is the default because it keeps the range that hidden states need: attention sinks reach 150 times the median
norm and overflow float16 in some models. `Fp16VectorCodec` raises an error then and does not clip. int8 halves the
bytes again at a relative error of 0.7 to 1 percent.

Encoding is in two steps, because int8 needs to see a shard before it can choose its scales, and a shard of float32
would not fit in memory: `stage` makes rows small as they come from the teacher, `encode` takes all rows of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs.checks import check_finite
from kdcache.codecs.floats import BF16, FP16, FP32, FloatFormat
from kdcache.config import Config
from kdcache.errors import CorruptCacheError, TeacherError
from kdcache.plugins import Table
from kdcache.schema import ArrayRecord

#: Largest magnitude that float16 may hold with a margin for later arithmetic (its maximum is 65,504).
FP16_LIMIT = 6e4
#: Rows that are converted at once.
_BLOCK = 4096
#: Scale of a channel or a row that is 0 throughout.
_TINY = np.float32(1e-30)


class VectorCodec(Config):
    """Base: one array called ``states`` in the float format of the subclass."""

    name: str
    _format: ClassVar[FloatFormat]

    def stage(self, states_PD: NDArray[np.float32]) -> NDArray[Any]:
        """Return rows as they are kept until their shard is complete."""
        return self._format.pack(states_PD)

    def encode(self, staged_PD: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Encode all rows of a shard, which `stage` returned."""
        return {"states": staged_PD}

    def check(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise ``CorruptCacheError`` unless the arrays of a shard decode to finite numbers."""

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode any rows (slices of the per-position arrays, with the whole of every table) to float32."""
        return self._format.unpack(arrays["states"])

    def arrays(self, width: int) -> tuple[ArrayRecord, ...]:
        """Describe the arrays that `encode` returns."""
        return (ArrayRecord(name="states", dtype=self._format.dtype, rows="positions", shape=(width,)),)


class _FloatCodec(VectorCodec):
    """Base of the codecs that store each number by itself, in the subclass's float format."""

    def check(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        check_finite(arrays["states"], self._format, "states")


class Bf16VectorCodec(_FloatCodec):
    """Bfloat16, stored as 16 bits each."""

    name: Literal["bf16"] = "bf16"
    _format = BF16


class Fp16VectorCodec(_FloatCodec):
    """Float16; raises ``TeacherError`` for magnitudes above 6e4."""

    name: Literal["fp16"] = "fp16"
    _format = FP16

    def stage(self, states_PD: NDArray[np.float32]) -> NDArray[Any]:
        largest = float(np.abs(states_PD).max(initial=0.0))
        if largest > FP16_LIMIT:
            raise TeacherError(
                f"a hidden state reaches {largest:.3g}, float16 holds {FP16_LIMIT:.0f} at most; use the bf16 codec"
            )
        return super().stage(states_PD)


class ExactVectorCodec(_FloatCodec):
    """Float32 as it came."""

    name: Literal["exact"] = "exact"
    _format = FP32


class Int8VectorCodec(VectorCodec):
    """One byte each: channels are divided by their rms, then every token by its own scale.

    The rms of a channel is that of *normalised* rows: an attention sink of 150 times the median norm would otherwise
    set the scale of its channels and leave nothing of all other tokens. The scale of a token maps its largest entry to
    127, so nothing is clipped, sinks included.
    """

    name: Literal["int8"] = "int8"
    _format = BF16  # until the shard is complete; its rounding is a quarter of int8's

    def encode(self, staged_PD: NDArray[Any]) -> dict[str, NDArray[Any]]:
        channel_D = self._channel_rms(staged_PD)
        states_PD = np.empty(staged_PD.shape, dtype=np.int8)
        token_P = np.empty(len(staged_PD), dtype=np.float32)
        for rows in _blocks(len(staged_PD)):
            scaled_PD = self._format.unpack(staged_PD[rows]) / channel_D
            token_P[rows] = np.maximum(np.abs(scaled_PD).max(axis=1, initial=0.0) / 127, _TINY)
            states_PD[rows] = np.rint(scaled_PD / token_P[rows, None])
        return {"states": states_PD, "token_scale": token_P, "channel_scale": channel_D}

    def _channel_rms(self, staged_PD: NDArray[Any]) -> NDArray[np.float32]:
        squares_D = np.zeros(staged_PD.shape[1])
        for rows in _blocks(len(staged_PD)):
            states_PD = self._format.unpack(staged_PD[rows])
            norm_P1 = np.sqrt((states_PD.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
            squares_D += ((states_PD / np.maximum(norm_P1, _TINY)) ** 2).sum(axis=0)
        rms_D = np.sqrt(squares_D / max(len(staged_PD), 1)).astype(np.float32)
        return np.maximum(rms_D, _TINY)

    def check(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name in ("token_scale", "channel_scale"):
            check_finite(arrays[name], FP32, name)
        largest = [float(np.abs(arrays[name]).max(initial=0)) for name in ("channel_scale", "token_scale")]
        if 128 * largest[0] * largest[1] > np.finfo(np.float32).max:
            raise CorruptCacheError(f"scales of {largest[0]:.3g} and {largest[1]:.3g} decode to infinite numbers")

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        states_PD, channel_D = arrays["states"], arrays["channel_scale"]
        if len(channel_D) != states_PD.shape[1]:
            raise CorruptCacheError(f"channel_scale has {len(channel_D)} entries for {states_PD.shape[1]} channels")
        return states_PD * channel_D * arrays["token_scale"][:, None]

    def arrays(self, width: int) -> tuple[ArrayRecord, ...]:
        return (
            ArrayRecord(name="states", dtype="int8", rows="positions", shape=(width,)),
            ArrayRecord(name="token_scale", dtype="float32", rows="positions"),
            ArrayRecord(name="channel_scale", dtype="float32", rows="table"),
        )


def _blocks(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, num_rows, _BLOCK))


def relative_error(codec: VectorCodec, states_PD: NDArray[np.float32]) -> float:
    """Return the root mean square over rows of |decoded - state| / |state|: what ``codec`` costs on these rows."""
    errors_P = relative_errors(codec.decode(codec.encode(codec.stage(states_PD))), states_PD)
    return float(np.sqrt((errors_P**2).mean())) if len(errors_P) else 0.0


def relative_errors(found_PD: NDArray[np.float32], states_PD: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return |found - state| / |state| of every row, [P]."""
    differences_P = np.linalg.norm((found_PD - states_PD).astype(np.float64), axis=1)
    errors_P: NDArray[np.float64] = differences_P / np.maximum(np.linalg.norm(states_PD, axis=1), _TINY)
    return errors_P


#: Every codec of hidden states by its name on the command line.
VECTOR_CODECS: Table[type[VectorCodec]] = Table(
    "codec",
    "kdcache.vector_codecs",
    {"bf16": Bf16VectorCodec, "fp16": Fp16VectorCodec, "int8": Int8VectorCodec, "exact": ExactVectorCodec},
)
