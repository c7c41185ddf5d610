"""A student and its objective as one module: what a distributed wrapper sees, and what the optimiser trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from kdcache.losses import LayerStates, Objective, TeacherRows
from kdcache.losses.hidden import HiddenTerm
from kdcache.losses.outputs import OutputTerm
from kdcache.losses.schedules import highest
from kdcache.students import Student
from kdcache.students.sentence_model import check_width
from kdcache.train.trainer import Distillation

log = logging.getLogger(__name__)


class Distiller(Distillation):
    """A student and its objective as one module, so that distributed wrappers see a single forward."""

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__(student)
        self.objective = objective
        # The parameters that are trained beside the student.
        self.terms = objective.terms
        self.hidden_fields = objective.needs.teacher_fields

    def forward(self, batch: Mapping[str, Tensor], num_valid: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
        needs = self.objective.needs
        hidden_PD, student_states = self.student.states(batch, needs.student_layers)
        if self.student.sentence is not None:
            batch = self.student.sentence.with_reduced(batch)
        states = LayerStates.from_batch(student_states, batch, needs, hidden_PD)
        rows = TeacherRows.from_batch(batch)
        result = self.objective(hidden_PD, self.student.head, rows, num_valid, states)
        return result.loss, result.sums, result.num_valid

    def set_progress(self, progress: float) -> None:
        self.objective.progress = progress

    def logged(self) -> dict[str, float]:
        return self.objective.scheduled


def fit_terms(objective: Objective, student: Student, seed: int) -> None:
    """Make the objective's terms for ``student``; ``seed`` decides their parameters.

    Raises ``ConfigError`` when a term does not fit the student, ``StudentError`` when that has no states to compare.
    """
    if not objective.config.terms:
        return
    _check_width(objective, student)
    reads_layers = any(isinstance(term, HiddenTerm) for term in objective.config.terms.values())
    objective.build_terms(student.layer_widths() if reads_layers else (), seed)
    if objective.context.kind != "outputs" and not any(
        highest(loss.weight) > 0 for loss in objective.config.losses.values()
    ):
        log.warning(
            "the objective has no loss beside %s, so the student's LM head learns nothing: whoever gives a weight "
            "gives them all (objective.forward_kl.weight=0.9, say)",
            " and ".join(objective.config.terms),
        )


def _check_width(objective: Objective, student: Student) -> None:
    if student.sentence is None or objective.context.outputs is None:
        return
    reduction_DC = student.sentence.reduction_DC
    width = objective.context.outputs.width if reduction_DC is None else len(reduction_DC)
    terms = objective.config.terms.items()
    check_width(student.vocab_size, width, [n for n, term in terms if isinstance(term, OutputTerm) and term.same_width])
