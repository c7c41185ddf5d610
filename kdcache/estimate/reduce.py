"""The first walk over a sample's logits: reduce them to every kind of targets, before any codec, and time it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.estimate.sample import Sample, split
from kdcache.schema import Targets, TargetsRecord
from kdcache.teachers import TargetReducer, sample_uniforms


@dataclass
class Reduced:
    """The targets of a sample's positions, and the tail prior of each half, [2, V], if there is one.

    ``reduce_s`` are the seconds of the reduction, ``head_s`` those of the logits, which all kinds of targets share.
    """

    targets: Targets
    priors_HV: NDArray[np.float64] | None
    reduce_s: float
    head_s: float


class _Reducer:
    """Reduces logits to one kind of targets, piece by piece."""

    def __init__(self, record: TargetsRecord, sample: Sample) -> None:
        self.seconds = 0.0
        self.parts: list[Targets] = []
        self._reduce = TargetReducer(record)
        self._sums_HV: list[Any] = [0.0, 0.0]
        self._counts_H = [0, 0]
        self._uniforms_PN: NDArray[np.float64] | None = None
        if record.num_samples:
            indices = [s.index for s in sample.sequences]
            self._uniforms_PN = sample_uniforms(record.seed, indices, sample.lengths_N, record.num_samples)

    def add(self, rows: slice, half: int, logits_CV: Tensor, labels_C: Tensor) -> None:
        began = time.perf_counter()
        uniforms_CN = None if self._uniforms_PN is None else self._uniforms_PN[rows]
        self.parts.append(self._reduce(lambda start, stop: logits_CV[start:stop], labels_C, uniforms_CN))
        taken = self._reduce.take_tail_sum()
        if taken is not None:
            self._sums_HV[half] = self._sums_HV[half] + taken[0]
            self._counts_H[half] += taken[1]
        self.seconds += time.perf_counter() - began

    def priors_HV(self) -> NDArray[np.float64] | None:
        """Return the mean probability of every id while it is not kept, for each half; None if one half is empty."""
        if not all(self._counts_H):
            return None
        return np.stack([total_V / count for total_V, count in zip(self._sums_HV, self._counts_H, strict=True)])


def reduce_all(
    sample: Sample, records: Iterable[TargetsRecord], *, report: Callable[[int], object] | None = None
) -> dict[TargetsRecord, Reduced]:
    """Reduce the logits of ``sample`` to every kind of targets in ``records``, in one walk.

    ``report`` is called with the number of positions done. Raises ``TeacherError`` for logits that are NaN.
    """
    reducers = {record: _Reducer(record, sample) for record in records}
    head_s, began = 0.0, time.perf_counter()
    for rows, logits_CV in sample.logits.chunks():
        _wait_for(logits_CV)
        head_s += time.perf_counter() - began
        labels_C = torch.from_numpy(sample.labels_P[rows]).to(logits_CV.device)
        for piece in split(rows, sample.half_block):
            inside = slice(piece.start - rows.start, piece.stop - rows.start)
            for reducer in reducers.values():
                reducer.add(piece, int(sample.half_P[piece.start]), logits_CV[inside], labels_C[inside])
        if report is not None:
            report(rows.stop)
        began = time.perf_counter()
    return {
        record: Reduced(Targets.concatenate(reducer.parts), reducer.priors_HV(), reducer.seconds, head_s)
        for record, reducer in reducers.items()
    }


def _wait_for(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":  # the product is only queued when the call returns
        torch.cuda.synchronize(tensor.device)
