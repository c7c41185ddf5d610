"""What is summed over positions to judge a model: the same sums for the teacher and for every student.

Sums, not means, so that batches of any size add up exactly; float64, because a million float32 addends would not.

The expected calibration error follows Guo et al. (2017, "On Calibration of Modern Neural Networks", section 2): top-1
confidences in 15 bins of equal width, mean over bins of |accuracy - confidence|, weighted by the bin's share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 15


@dataclass
class Calibration:
    """Counts, confidences and hits per confidence bin; bin i holds confidences in (i / 15, (i + 1) / 15]."""

    count: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))
    confidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))
    correct: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))

    def add(self, confidence_P: NDArray[np.floating], correct_P: NDArray[np.bool_]) -> None:
        """Add P predictions: the probability of the top-1 id, and whether it was the corpus's own answer."""
        bins = np.clip(np.ceil(confidence_P.astype(np.float64) * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
        self.count += np.bincount(bins, minlength=NUM_BINS)
        self.confidence += np.bincount(bins, weights=confidence_P, minlength=NUM_BINS)
        self.correct += np.bincount(bins, weights=correct_P, minlength=NUM_BINS)

    @property
    def error(self) -> float:
        """Expected calibration error, between 0 and 1."""
        return float(np.abs(self.correct - self.confidence).sum() / max(self.count.sum(), 1))


@dataclass
class ClassCounts:
    """Of C classes: right answers, answers, and rows that are of the class; what F1 is made of."""

    num_classes: int
    correct_C: NDArray[np.int64] = field(init=False)
    predicted_C: NDArray[np.int64] = field(init=False)
    actual_C: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.correct_C, self.predicted_C, self.actual_C = (np.zeros(self.num_classes, np.int64) for _ in range(3))

    def add(self, predicted_P: NDArray[np.integer], actual_P: NDArray[np.integer]) -> None:
        """Add the predicted and the actual classes of P rows."""
        pairs = (
            (self.correct_C, actual_P[predicted_P == actual_P]),
            (self.predicted_C, predicted_P),
            (self.actual_C, actual_P),
        )
        for counts_C, classes_P in pairs:
            counts_C += np.bincount(classes_P, minlength=self.num_classes)


@dataclass
class Tally:
    """Sums over the positions that count of one model's predictions against corpus and teacher."""

    calibration: Calibration = field(default_factory=Calibration)
    num_positions: int = 0
    num_labelled: int = 0
    """Positions that count and for which the corpus has an answer: loss, accuracy and calibration are over these."""
    sums: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        valid_P: NDArray[np.bool_],
        is_labelled_P: NDArray[np.bool_],
        *,
        top1_prob_P: NDArray[np.floating],
        correct_P: NDArray[np.bool_],
        loss_P: NDArray[np.floating] | None,
        **values_P: NDArray[np.generic],
    ) -> None:
        """Add the positions of a batch where ``valid_P``; ``values_P`` are further values to average over them."""
        known_P = valid_P & is_labelled_P
        self.num_positions += int(valid_P.sum())
        self.num_labelled += int(known_P.sum())
        self.calibration.add(top1_prob_P[known_P], correct_P[known_P])
        self._add({"correct": correct_P} if loss_P is None else {"loss": loss_P, "correct": correct_P}, known_P)
        self._add(values_P, valid_P)

    def _add(self, values_P: Mapping[str, NDArray[np.generic]], where_P: NDArray[np.bool_]) -> None:
        for name, value_P in values_P.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value_P[where_P].sum(dtype=np.float64))

    def mean(self, name: str) -> float:
        """Return the mean per position of the values called ``name``."""
        return self.sums.get(name, 0.0) / max(self.num_positions, 1)
