"""What tasks whose models answer with numbers are judged by, from all of a model's answers.

One function for each task, in the table at the end: from the answers of a model, and those of the teacher to compare a
student with, to numbers by name. A number that cannot be had (no labels) is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.evaluate.metrics import pearson, spearman
from kdcache.evaluate.rankings import alike_rankings, judged_rankings

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Answers:
    """A model's outputs [P, C] at all rows, the corpus's own numbers (NaN: none), and the sequence of every row.

    Rows of a sequence stand next to each other, and sequences are in order.
    """

    outputs_PC: NDArray[np.float32]
    labels_P: NDArray[np.float32]
    groups_P: NDArray[np.int64]


Measure = Callable[[Answers, Answers | None], Metrics]


def measures_of(task: str) -> Measure:
    """Return what computes the metrics of a task; a task without a row is compared with its teacher alone."""
    return MEASURES.get(task, _against_teacher)


def regression(answers: Answers, teacher: Answers | None) -> Metrics:
    """Return correlations of the scores with the corpus's own, the mean squared error, and likeness to the teacher."""
    is_known_P = ~np.isnan(answers.labels_P)
    scores, labels = answers.outputs_PC[is_known_P, 0], answers.labels_P[is_known_P]
    found: Metrics = {
        "pearson": pearson(scores, labels),
        "spearman": spearman(scores, labels),
        "mse": float(np.square(scores - labels).mean()) if len(labels) else None,
    }
    return found | _against_teacher(answers, teacher)


def ranking(answers: Answers, teacher: Answers | None) -> Metrics:
    """Return where a query's relevant documents end up, and likeness to the teacher's ranking."""
    scores_P, groups_P = answers.outputs_PC[:, 0], answers.groups_P
    found: Metrics = judged_rankings(scores_P, answers.labels_P, groups_P)
    return found | ({} if teacher is None else alike_rankings(scores_P, teacher.outputs_PC[:, 0], groups_P))


def embedding(answers: Answers, teacher: Answers | None) -> Metrics:
    """Return the correlation of the cosines of pairs with the corpus's judgements, and likeness to the teacher.

    ``teacher_cosine`` is the mean cosine of student and teacher; None where they are not equally wide.
    """
    first_Q = np.flatnonzero(answers.groups_P[1:] == answers.groups_P[:-1])
    first_Q = first_Q[~np.isnan(answers.labels_P[first_Q])]
    found: Metrics = {}
    if len(first_Q):
        cosines_Q = _cosines(answers.outputs_PC[first_Q], answers.outputs_PC[first_Q + 1])
        found["spearman"] = spearman(cosines_Q, answers.labels_P[first_Q])
    if teacher is None:
        return found
    is_alike = answers.outputs_PC.shape == teacher.outputs_PC.shape
    mean = float(_cosines(answers.outputs_PC, teacher.outputs_PC).mean()) if is_alike else None
    return found | {"teacher_cosine": mean}


def _cosines(first_NC: NDArray[np.float32], second_NC: NDArray[np.float32]) -> NDArray[np.float64]:
    first, second = first_NC.astype(np.float64), second_NC.astype(np.float64)
    lengths_N = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.maximum(lengths_N, 1e-12)


def _against_teacher(answers: Answers, teacher: Answers | None) -> Metrics:
    if teacher is None:
        return {}
    return {"teacher_pearson": pearson(answers.outputs_PC.reshape(-1), teacher.outputs_PC.reshape(-1))}


MEASURES: dict[str, Measure] = {
    "sequence-regression": regression,
    "ranking": ranking,
    "embedding": embedding,
}
