from __future__ import annotations

import numpy as np
import pytest

from kdcache.evaluate.distributions import ClassCounts
from kdcache.evaluate.measures import Answers, regression
from kdcache.evaluate.metrics import macro_f1, pearson, ranks, spearman


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_pearson_by_hand():
    # Means 2 and 4; deviations (-1, 0, 1) and (-2, 2, 0): the products sum to 2, the squares to 2 and 8.
    assert pearson(array(1, 2, 3), array(2, 6, 4)) == pytest.approx(2 / 4)
    assert pearson(array(1, 2, 3), array(-10, -20, -30)) == pytest.approx(-1)


def test_pearson_is_numpys():
    first, second = np.random.default_rng(0).normal(size=(2, 500))
    second += 0.5 * first
    assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1], rel=1e-12)
    # A large offset costs float32 its digits, not the sums.
    assert pearson(first * 1000 + 1e6, second) == pytest.approx(np.corrcoef(first, second)[0, 1], rel=1e-9)


@pytest.mark.parametrize(("first", "second"), [((), ()), ((1,), (2,)), ((1, 1, 1), (1, 2, 3)), ((1, 2), (5, 5))])
def test_a_correlation_that_is_not_defined_is_none(first, second):
    assert pearson(array(*first), array(*second)) is None
    assert spearman(array(*first), array(*second)) is None


def test_equal_values_share_their_mean_rank():
    assert ranks(array(3, 1, 3, 2, 3)).tolist() == [3, 0, 3, 1, 3]
    assert ranks(array(5, 5)).tolist() == [0.5, 0.5]
    assert ranks(array()).tolist() == []


def test_spearman_by_hand():
    # Without ties it is 1 - 6 sum d^2 / (n (n^2 - 1)); ranks differ by 1, 1, 1, 1, 0.
    assert spearman(array(10, 20, 30, 40, 50), array(2, 1, 4, 3, 5)) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # With a tie: ranks (0, 1.5, 1.5, 3) against (0, 1, 2, 3); products of deviations 4.5, squares 4.5 and 5.
    assert spearman(array(1, 2, 2, 3), array(1, 2, 3, 4)) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman(array(1, 2, 3), np.exp(array(1, 2, 3))) == pytest.approx(1)


def f1_by_hand(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Mean over the classes that occur of the harmonic mean of precision and recall."""
    scores = []
    for c in sorted({*predicted.tolist(), *actual.tolist()}):
        hits = ((predicted == c) & (actual == c)).sum()
        precision = hits / max((predicted == c).sum(), 1)
        recall = hits / max((actual == c).sum(), 1)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return float(np.mean(scores))


@pytest.mark.parametrize("num_used", [2, 5, 9])
def test_macro_f1_of_counts_that_are_added_batch_by_batch(num_used):
    generator = np.random.default_rng(num_used)
    actual = generator.integers(0, num_used, 300)
    predicted = np.where(generator.random(300) < 0.6, actual, generator.integers(0, num_used, 300))
    counts = ClassCounts(9)
    for rows in np.split(np.arange(300), [7, 7, 100]):
        counts.add(predicted[rows], actual[rows])
    found = macro_f1(counts.correct_C, counts.predicted_C, counts.actual_C)
    assert found == pytest.approx(f1_by_hand(predicted, actual), rel=1e-12)


def test_macro_f1_by_hand():
    counts = ClassCounts(4)
    counts.add(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0]))
    # F1 is 1/2 of class 0, 4/5 of class 1, 0 of class 2; class 3 never occurs.
    assert macro_f1(counts.correct_C, counts.predicted_C, counts.actual_C) == pytest.approx((1 / 2 + 4 / 5) / 3)


def test_macro_f1_of_nothing_is_none():
    counts = ClassCounts(3)
    assert macro_f1(counts.correct_C, counts.predicted_C, counts.actual_C) is None


def answers(scores: tuple[float, ...], labels: tuple[float, ...]) -> Answers:
    return Answers(array(*scores)[:, None], array(*labels), np.arange(len(scores)))


def test_regression_is_over_rows_with_a_label_and_likeness_over_all():
    student, teacher = answers((1, 2, 3, 9), (2, 6, 4, np.nan)), answers((2, 4, 6, 18), (2, 6, 4, np.nan))
    found = regression(student, teacher)
    assert found["pearson"] == pytest.approx(0.5)
    assert found["spearman"] == pytest.approx(0.5)
    assert found["mse"] == pytest.approx((1 + 16 + 1) / 3)
    assert found["teacher_pearson"] == pytest.approx(1)
    assert "teacher_pearson" not in regression(teacher, None)


def test_regression_without_labels_compares_with_the_teacher_alone():
    nothing = (np.nan,) * 3
    found = regression(answers((1, 2, 3), nothing), answers((2, 6, 4), nothing))
    assert found == {"pearson": None, "spearman": None, "mse": None, "teacher_pearson": pytest.approx(0.5)}
