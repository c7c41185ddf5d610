"""What rankers are judged by: where the relevant documents of a query end up, and how alike two rankings are.

Only the documents of the cache are ranked: these are numbers of reranking them, and the ideal order that nDCG divides
by is the best order of these same documents. A query whose relevant documents are not among them counts 0 in every
metric, as nobody can rerank it right; a query that nobody has judged does not count.

Of documents with equal scores the less relevant one stands first: a model that does not decide gains nothing by the
order in which the corpus happens to name them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.evaluate.metrics import dcg, reciprocal_rank, spearman

_CUT = 10


def judged_rankings(
    scores_P: NDArray[np.floating], relevance_P: NDArray[np.floating], groups_P: NDArray[np.int64]
) -> dict[str, float | None]:
    """Return nDCG@10, MRR@10 and hit@1 over all judged queries; None where there is none.

    Rows with the same number in ``groups_P`` are the documents of a query and stand next to each other;
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


def alike_rankings(
    scores_P: NDArray[np.floating], teacher_P: NDArray[np.floating], groups_P: NDArray[np.int64]
) -> dict[str, float | None]:
    """Return how alike the rankings of student and teacher are, the mean over queries; None where there is none.

    Only queries between whose documents the teacher decides. ``teacher_spearman`` is the correlation of the ranks of a
    query's documents, 0 where the student gives all the same score; ``teacher_top1`` the share of queries where the
    teacher's first document is the student's too, alone.
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
