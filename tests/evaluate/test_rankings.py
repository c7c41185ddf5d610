"""Numbers of rankings, from lists small enough to count by hand, and against plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from kdcache.evaluate.measures import Answers
from kdcache.evaluate.metrics import judged_rankings, ranking_agreement
from kdcache.tasks import TASKS

#: The place from the front (from 0) of the relevant documents, and how many documents there are.
BY_HAND = {
    "first": ([0], 3, {"ndcg_at_10": 1.0, "mrr_at_10": 1.0, "hit_at_1": 1.0}),
    "second": ([1], 3, {"ndcg_at_10": 1 / math.log2(3), "mrr_at_10": 0.5, "hit_at_1": 0.0}),
    "two": (
        [0, 2],
        4,
        {"ndcg_at_10": (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)), "mrr_at_10": 1.0, "hit_at_1": 1.0},
    ),
    "tenth": ([9], 12, {"ndcg_at_10": 1 / math.log2(11), "mrr_at_10": 0.1, "hit_at_1": 0.0}),
    "eleventh": ([10], 12, {"ndcg_at_10": 0.0, "mrr_at_10": 0.0, "hit_at_1": 0.0}),
    "none": ([], 3, {"ndcg_at_10": 0.0, "mrr_at_10": 0.0, "hit_at_1": 0.0}),
    "only one": ([0], 1, {"ndcg_at_10": 1.0, "mrr_at_10": 1.0, "hit_at_1": 1.0}),
}


def query(places: list[int], count: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores and relevance of documents in a random order whose best-scored ones at ``token_index`` are relevant."""
    order = np.random.default_rng(seed).permutation(count)
    scores, relevance = np.zeros(count, np.float32), np.zeros(count, np.float32)
    scores[order] = -np.arange(count)
    relevance[order[places]] = 1
    return scores, relevance


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    places, count, expected = BY_HAND[name]
    scores, relevance = query(places, count)
    assert judged_rankings(scores, relevance, np.full(count, 7)) == pytest.approx(expected)


def test_the_mean_is_over_queries_not_documents() -> None:
    parts = [query(places, count, seed) for seed, (places, count, _) in enumerate(BY_HAND.values())]
    groups = np.repeat(np.arange(len(parts)), [len(scores) for scores, _ in parts])
    scores, relevance = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    found = judged_rankings(scores, relevance, groups)
    for name in ("ndcg_at_10", "mrr_at_10", "hit_at_1"):
        assert found[name] == pytest.approx(np.mean([expected[name] for *_, expected in BY_HAND.values()]))


def test_grades_are_gains() -> None:
    scores, relevance = np.array([3.0, 2.0, 1.0]), np.array([1.0, 3.0, np.nan])
    expected = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert judged_rankings(scores, relevance, np.zeros(3, int))["ndcg_at_10"] == pytest.approx(expected)


def test_queries_that_nobody_judged_do_not_count() -> None:
    scores, relevance = np.array([1.0, 2.0, 1.0, 2.0]), np.array([0, 1, np.nan, np.nan])
    groups = np.array([0, 0, 1, 1])
    assert judged_rankings(scores, relevance, groups)["mrr_at_10"] == 1.0
    nobody = np.full(4, np.nan)
    assert judged_rankings(scores, nobody, groups) == {"ndcg_at_10": None, "mrr_at_10": None, "hit_at_1": None}


def test_equal_scores_gain_nothing_by_the_corpus_order() -> None:
    relevance = np.array([1.0, 0, 0, 0])
    found = judged_rankings(np.zeros(4), relevance, np.zeros(4, int))
    assert (found["mrr_at_10"], found["hit_at_1"]) == (0.25, 0.0)


def test_rankings_alike() -> None:
    teacher = np.array([1.0, 2, 3, 4, 10, 20, 30, 5, 6])
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    assert ranking_agreement(teacher * 2 - 5, teacher, groups) == {
        "teacher_spearman": pytest.approx(1),
        "teacher_top1": 1,
    }
    turned = np.concatenate([teacher[:4], -teacher[4:7], teacher[7:]])
    found = ranking_agreement(turned, teacher, groups)
    assert found == {"teacher_spearman": pytest.approx(1 / 3), "teacher_top1": pytest.approx(2 / 3)}


def test_a_student_that_does_not_decide_is_not_like_the_teacher() -> None:
    teacher, groups = np.array([3.0, 2.0, 1.0]), np.zeros(3, int)
    assert ranking_agreement(np.zeros(3), teacher, groups) == {"teacher_spearman": 0.0, "teacher_top1": 0.0}


def test_lists_that_cannot_be_ordered_do_not_count() -> None:
    teacher, groups = np.array([1.0, 2.0, 2.0]), np.array([0, 1, 1])
    assert ranking_agreement(teacher, teacher, groups) == {"teacher_spearman": None, "teacher_top1": None}


def test_the_teachers_row_is_compared_with_the_corpus_alone() -> None:
    scores, relevance = query([1], 3)
    answers = Answers(scores[:, None], relevance, np.zeros(3, np.int64))
    measure = TASKS["ranking"].metrics
    assert list(measure(answers, None)) == ["ndcg_at_10", "mrr_at_10", "hit_at_1"]
    both = measure(answers, answers)
    assert (both["mrr_at_10"], both["teacher_spearman"], both["teacher_top1"]) == (0.5, pytest.approx(1), 1)
