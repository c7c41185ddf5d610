"""A student and its objective as one module: what a distributed wrapper sees, and what the optimiser trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from kdcache.losses import Objective
from kdcache.losses.outputs import OutputTerm
from kdcache.losses.schedules import highest
from kdcache.step import StepInputs
from kdcache.students import Student
from kdcache.students.sentence_model import check_width

log = logging.getLogger(__name__)


class Distiller(nn.Module):
    """A student and its objective as one module, so that distributed wrappers see a single forward.

    The student's model is under ``model``, the parameters that the objective's terms own under ``terms``. Override
    `inputs` to get the teacher's part of a batch from elsewhere, or `forward` to compute the loss another way.
    """

    #: For the Trainer: the loss is already divided by the number of positions of the whole step.
    accepts_loss_kwargs = True

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__()
        self.model = student.model
        self.student = student
        self.objective = objective
        self.terms = objective.terms

    @property
    def hidden_fields(self) -> tuple[str, ...]:
        """Names of the cache's fields of hidden states and raw outputs that a batch must hold."""
        return self.objective.needs.teacher_fields

    def inputs(self, batch: Mapping[str, Tensor]) -> StepInputs:
        """Run the student on a collated batch and return what the objective is called with."""
        return StepInputs.of(self.student, batch, self.objective.needs)

    def forward(self, batch: Mapping[str, Tensor], num_valid: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
        """Return the loss, each term's unweighted sum over the valid positions (detached), and their number.

        ``num_valid`` is the number of valid positions of the whole optimiser step, by which the loss is divided.
        """
        result = self.inputs(batch).loss(self.objective, self.student, num_valid)
        return result.loss, result.sums, result.num_valid

    def set_progress(self, progress: float) -> None:
        """Set how far the run is, before every optimiser step: 0 at the first, 1 at the last."""
        self.objective.progress = progress

    def logged(self) -> dict[str, float]:
        """Return what to log in addition to the means of the terms: the scheduled settings."""
        return self.objective.scheduled


def fit_terms(objective: Objective, student: Student, seed: int) -> None:
    """Build the objective's terms for ``student``; ``seed`` decides their parameters.

    Raises ``ConfigError`` when a term does not fit the student, ``StudentError`` when that has no states to compare.
    """
    if not objective.config.terms:
        return
    _check_width(objective, student)
    reads_layers = any(not isinstance(term, OutputTerm) for term in objective.config.terms.values())
    objective.build_terms(student.layer_widths() if reads_layers else (), seed)
    if objective.context.kind != "outputs" and not any(
        highest(loss.weight) > 0 for loss in objective.config.losses.values()
    ):
        log.warning(
            "the objective has no loss besides %s, so the student's LM head learns nothing: setting any weight "
            "disables all losses that are not listed; add one (objective.forward_kl.weight=0.9, say)",
            " and ".join(objective.config.terms),
        )


def _check_width(objective: Objective, student: Student) -> None:
    if student.sentence is None or objective.context.outputs is None:
        return
    reduction_DC = student.sentence.reduction_DC
    width = objective.context.outputs.width if reduction_DC is None else len(reduction_DC)
    terms = objective.config.terms.items()
    check_width(student.vocab_size, width, [n for n, term in terms if isinstance(term, OutputTerm) and term.same_width])
