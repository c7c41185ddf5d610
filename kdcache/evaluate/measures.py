"""Metrics of the tasks whose models answer with numbers, from all of a model's answers.

`Task.metrics` of a task calls its function here, with the answers of a model, and those of the teacher to compare a
student with. A metric that cannot be computed (no labels) is None.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.evaluate.metrics import judged_rankings, pearson, ranking_agreement, spearman
from kdcache.tasks.base import Metrics


@dataclass(frozen=True)
class Answers:
    """A model's outputs [P, C] at all positions, the labels (NaN: none), and the sequence of every position.

    Outputs are scores, embeddings, or logits of classes; labels of classes are their numbers. Positions of a sequence
    are next to each other, and sequences are in order.
    """

    outputs_PC: NDArray[np.float32]
    labels_P: NDArray[np.float32]
    groups_P: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Iterable[Answers]) -> Answers:
        """Return the answers of all batches in the order of their sequences."""
        columns = zip(*((part.outputs_PC, part.labels_P, part.groups_P) for part in parts), strict=True)
        outputs_PC, labels_P, groups_P = (np.concatenate(arrays) for arrays in columns)
        order = np.argsort(groups_P, kind="stable")
        return cls(outputs_PC[order], labels_P[order], groups_P[order])


def regression(answers: Answers, teacher: Answers | None) -> Metrics:
    """Return correlations of the scores with the labels, the mean squared error, and agreement with the teacher."""
    is_known_P = ~np.isnan(answers.labels_P)
    scores, labels = answers.outputs_PC[is_known_P, 0], answers.labels_P[is_known_P]
    found: Metrics = {
        "pearson": pearson(scores, labels),
        "spearman": spearman(scores, labels),
        "mse": float(np.square(scores - labels).mean()) if len(labels) else None,
    }
    return found | against_teacher(answers, teacher)


def ranking(answers: Answers, teacher: Answers | None) -> Metrics:
    """Return nDCG, MRR and hit rate, and agreement with the teacher's ranking."""
    scores_P, groups_P = answers.outputs_PC[:, 0], answers.groups_P
    found: Metrics = judged_rankings(scores_P, answers.labels_P, groups_P)
    return found | ({} if teacher is None else ranking_agreement(scores_P, teacher.outputs_PC[:, 0], groups_P))


def embedding(answers: Answers, teacher: Answers | None) -> Metrics:
    """Return the correlation of the cosines of pairs with their labels, and agreement with the teacher.

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


def against_teacher(answers: Answers, teacher: Answers | None) -> Metrics:
    """Return the correlation of all outputs with the teacher's."""
    if teacher is None:
        return {}
    return {"teacher_pearson": pearson(answers.outputs_PC.reshape(-1), teacher.outputs_PC.reshape(-1))}
