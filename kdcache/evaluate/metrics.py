"""Metrics over plain arrays: correlations, rankings, classes. Each returns None where it is not defined.

Standard definitions, from NumPy alone: SciPy and scikit-learn would be two more dependencies for five formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pearson(first_N: NDArray[np.floating], second_N: NDArray[np.floating]) -> float | None:
    """Return the linear correlation of two arrays; None for fewer than two values or a constant array."""
    if len(first_N) < 2:
        return None
    first, second = (array.astype(np.float64) - array.astype(np.float64).mean() for array in (first_N, second_N))
    scale = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / scale) if scale > 0 else None


def spearman(first_N: NDArray[np.floating], second_N: NDArray[np.floating]) -> float | None:
    """Return the correlation of the ranks of two arrays, equal values sharing their mean rank."""
    return pearson(ranks(first_N), ranks(second_N))


def ranks(values_N: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the rank of every value, from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = (last - counts + last - 1) / 2
    return means[inverse.reshape(-1)]


def dcg(gains: Sequence[float] | NDArray[np.floating]) -> float:
    """Return the discounted cumulative gain, the sum of gain / log2(rank + 1); ``gains`` are in the order of ranks."""
    found = np.asarray(gains, np.float64)
    return float((found / np.log2(np.arange(2, len(found) + 2))).sum())


def reciprocal_rank(gains: Sequence[float] | NDArray[np.floating]) -> float:
    """Return 1 / rank of the first document with a gain above 0; 0 where there is none."""
    relevant = np.flatnonzero(np.asarray(gains) > 0)
    return 1 / (1 + int(relevant[0])) if len(relevant) else 0.0


def macro_f1(correct_C: NDArray[np.int64], predicted_C: NDArray[np.int64], actual_C: NDArray[np.int64]) -> float | None:
    """Return the mean over classes of F1 = 2 correct / (predicted + actual); None if there is nothing to judge.

    The arguments count, by class, right answers, answers, and rows that are of the class. Classes that are neither
    given as an answer nor asked for are left out of the mean.
    """
    seen_C = predicted_C + actual_C
    is_seen_C = seen_C > 0
    return float((2 * correct_C[is_seen_C] / seen_C[is_seen_C]).mean()) if is_seen_C.any() else None
