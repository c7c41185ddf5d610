"""Codecs of hidden states: float32 [P, D] in, one array out.

bf16 is the default because it keeps the range that hidden states need: attention sinks reach 150 times the median
norm and overflow float16 in some models, which `Fp16HiddenCodec` therefore refuses rather than clips.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs.floats import BF16, FP16, FP32, FloatFormat
from kdcache.config import Config
from kdcache.errors import TeacherError
from kdcache.schema import ArrayRecord

#: Largest magnitude that float16 may hold with a margin for later arithmetic (its maximum is 65,504).
FP16_LIMIT = 6e4


class HiddenCodec(Config):
    """Base: one array called ``states`` in the float format of the subclass."""

    name: str
    _format: ClassVar[FloatFormat]

    def encode(self, states_PD: NDArray[np.float32]) -> NDArray[Any]:
        """Encode P rows."""
        return self._format.pack(states_PD)

    def decode(self, stored_PD: NDArray[Any]) -> NDArray[np.float32]:
        """Decode rows to float32."""
        return self._format.unpack(stored_PD)

    def arrays(self, width: int) -> tuple[ArrayRecord, ...]:
        """Describe the stored array."""
        return (ArrayRecord(name="states", dtype=self._format.dtype, rows="positions", shape=(width,)),)


class Bf16HiddenCodec(HiddenCodec):
    """Bfloat16, stored as 16 bits each."""

    name: Literal["bf16"] = "bf16"
    _format = BF16


class Fp16HiddenCodec(HiddenCodec):
    """Float16; refuses magnitudes above 6e4."""

    name: Literal["fp16"] = "fp16"
    _format = FP16

    def encode(self, states_PD: NDArray[np.float32]) -> NDArray[Any]:
        largest = float(np.abs(states_PD).max(initial=0.0))
        if largest > FP16_LIMIT:
            raise TeacherError(
                f"a hidden state reaches {largest:.3g}, float16 holds {FP16_LIMIT:.0f} at most; use the bf16 codec"
            )
        return super().encode(states_PD)


class ExactHiddenCodec(HiddenCodec):
    """Float32 as it came."""

    name: Literal["exact"] = "exact"
    _format = FP32


#: Every codec of hidden states by its name on the command line.
HIDDEN_CODECS: dict[str, type[HiddenCodec]] = {
    "bf16": Bf16HiddenCodec,
    "fp16": Fp16HiddenCodec,
    "exact": ExactHiddenCodec,
}
