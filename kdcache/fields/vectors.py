"""Numbers of one shape at every position or token: hidden states, raw outputs, and others.

A value is float32 [P, ...] or [T, ...]. Codecs see it as a matrix: the further axes are one to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs import VectorCodec, vector_codec
from kdcache.codecs.vectors import relative_error
from kdcache.fields.base import Arrays, FieldKind
from kdcache.schema import ArrayRecord, FieldRecord, Plan, SequenceBatch

#: The codec's array of the numbers themselves.
_STATES = "states"
#: Name, in a batch, of the hidden state from which the LM head makes the distribution.
LAST_STATE = "last"


class VectorsField(FieldKind):
    """Numbers of any shape at every position or token."""

    def __init__(self, record: FieldRecord, plan: Plan) -> None:
        super().__init__(record, plan)
        self.codec: VectorCodec = vector_codec(record.codec)
        states = next((array for array in record.arrays if array.name == _STATES), None)
        self.shape = () if states is None else states.shape
        self._axis = "positions" if states is None or states.rows not in ("positions", "tokens") else states.rows

    @property
    def axis(self) -> str:
        return self._axis

    def arrays(self) -> tuple[ArrayRecord, ...]:
        return vector_arrays(self.codec, self.shape, self._axis)

    def stage(self, value: NDArray[np.float32]) -> NDArray[Any]:
        return self.codec.stage(_as_matrix(value)).reshape(value.shape)

    def encode(self, staged: NDArray[Any]) -> dict[str, NDArray[Any]]:
        encoded = self.codec.encode(_as_matrix(staged))
        return {**encoded, _STATES: encoded[_STATES].reshape(staged.shape)}

    def open(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        self.codec.check(arrays)
        return dict(arrays)

    def decode(self, arrays: Mapping[str, Any]) -> NDArray[np.float32]:
        states = arrays[_STATES]
        if states.ndim == 2:
            return self.codec.decode(arrays)
        return self.codec.decode({**arrays, _STATES: _as_matrix(states)}).reshape(states.shape)

    def check(self, batch: SequenceBatch) -> Iterator[str]:
        if not np.isfinite(batch.fields[self.name]).all():
            yield f"field {self.name} holds values that are not finite"

    @classmethod
    def collate(cls, name: str, batch: SequenceBatch) -> dict[str, NDArray[Any]]:
        return {"teacher_hidden" if name == LAST_STATE else name: batch.fields[name]}

    def transcoded(self, settings: Mapping[str, Any], sample: NDArray[np.float32] | None) -> FieldRecord:
        """Return the record of the field with the codec of ``settings``, and with what that adds to the error."""
        codec = vector_codec(settings) if settings else self.codec
        if sample is None:
            return self.record
        before = 0.0 if self.record.codec["name"] == "exact" else self.record.relative_error
        error = None if before is None else float(np.hypot(before, relative_error(codec, _as_matrix(sample))))
        return vectors_field(self.name, codec, self.shape, axis=self._axis, relative_error=error)


def _as_matrix(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.ndim == 2 else values.reshape(len(values), prod(values.shape[1:]))


def vector_arrays(codec: VectorCodec, shape: tuple[int, ...], axis: str = "positions") -> tuple[ArrayRecord, ...]:
    """Describe the arrays of vectors of ``shape`` at every position, or at every token."""
    changes = {_STATES: {"shape": shape}}
    return tuple(
        array if array.rows != "positions" else array.model_copy(update={"rows": axis, **changes.get(array.name, {})})
        for array in codec.arrays(prod(shape))
    )


def vectors_field(
    name: str,
    codec: VectorCodec,
    shape: int | tuple[int, ...],
    *,
    axis: str = "positions",
    relative_error: float | None = None,
) -> FieldRecord:
    """Describe a field of vectors; ``axis`` says whether they belong to ``positions`` or ``tokens``."""
    arrays = vector_arrays(codec, (shape,) if isinstance(shape, int) else shape, axis)
    return FieldRecord(
        name=name, kind="vectors", codec=codec.model_dump(), arrays=arrays, relative_error=relative_error
    )
