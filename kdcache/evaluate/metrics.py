"""Metrics over plain arrays: correlations, classes, rankings. Each returns None where it is not defined.

Standard definitions in NumPy alone: SciPy and scikit-learn would be two more dependencies for a few formulas.

Rankings are those of the documents in the cache: the metrics are of reranking them, and the ideal order that nDCG
divides by is the best order of these same documents. A query whose relevant documents are not among them counts 0 in
every metric, as no reranking can be right; a query without any judgement does not count. Of documents with equal scores
the less relevant one is ranked first, so a model that does not decide gains nothing from the order of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    """Return the mean over classes of F1 = 2 correct / (predicted + actual); None if there are no labels.

    The arguments count, by class, correct predictions, predictions, and labels. Classes that are neither predicted nor
    a label are left out of the mean.
    """
    seen_C = predicted_C + actual_C
    is_seen_C = seen_C > 0
    return float((2 * correct_C[is_seen_C] / seen_C[is_seen_C]).mean()) if is_seen_C.any() else None


# ------------------------------------------------------------------------------------------------------- rankings

_CUT = 10


def judged_rankings(
    scores_P: NDArray[np.floating], relevance_P: NDArray[np.floating], groups_P: NDArray[np.int64]
) -> dict[str, float | None]:
    """Return nDCG@10, MRR@10 and hit@1 over all judged queries; None if there are none.

    Positions with the same number in ``groups_P`` are the documents of a query and are next to each other;
    ``relevance_P`` is NaN where unknown. nDCG takes the relevance itself as gain; a document is relevant from above 0.
    """
    gains = [
        _in_order(scores_P[query], relevance_P[query])
        for query in _queries(groups_P)
        if not np.isnan(relevance_P[query]).all()
    ]
    return {
        "ndcg_at_10": _mean([_ndcg(gains_N) for gains_N in gains]),
        "mrr_at_10": _mean([reciprocal_rank(gains_N[:_CUT]) for gains_N in gains]),
        "hit_at_1": _mean([float(gains_N[0] > 0) for gains_N in gains]),
    }


def ranking_agreement(
    scores_P: NDArray[np.floating], teacher_P: NDArray[np.floating], groups_P: NDArray[np.int64]
) -> dict[str, float | None]:
    """Return the agreement of the rankings of student and teacher, the mean over queries; None if there are none.

    Only queries count whose documents have different scores of the teacher. ``teacher_spearman`` is the correlation of
    the ranks of a query's documents, 0 where the student gives all the same score; ``teacher_top1`` the share of
    queries where the teacher's first document is the student's too, alone.
    """
    queries = [query for query in _queries(groups_P) if np.ptp(teacher_P[query]) > 0]
    return {
        "teacher_spearman": _mean([spearman(scores_P[query], teacher_P[query]) or 0.0 for query in queries]),
        "teacher_top1": _mean([_same_first(scores_P[query], teacher_P[query]) for query in queries]),
    }


def _same_first(scores_N: NDArray[np.floating], teacher_N: NDArray[np.floating]) -> float:
    not_below = scores_N >= scores_N[teacher_N.argmax()]
    return float(not_below.sum() == 1)


def _queries(groups_P: NDArray[np.int64]) -> Iterator[slice]:
    borders = np.flatnonzero(np.diff(groups_P)) + 1
    starts, stops = np.concatenate([[0], borders]), np.concatenate([borders, [len(groups_P)]])
    yield from (slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))


def _in_order(scores_N: NDArray[np.floating], relevance_N: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the gain of each document, best score first."""
    gains_N = np.nan_to_num(relevance_N.astype(np.float64)).clip(min=0)
    return gains_N[np.lexsort((gains_N, -scores_N))]


def _ndcg(gains_N: NDArray[np.float64]) -> float:
    best = dcg(np.sort(gains_N)[::-1][:_CUT])
    return dcg(gains_N[:_CUT]) / best if best > 0 else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
