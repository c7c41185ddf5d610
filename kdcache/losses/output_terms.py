"""Terms over raw outputs: the numbers that student and teacher answer a row with, of equal width.

Scores of a regressor, logits of classes before any softmax, embeddings. Where student and teacher differ in width the
student has a layer of its own for it (it has to be saved with the student, unlike the map of a hidden-state term), so
nothing here has parameters. What compares rows with each other, within a query or a batch, is in
``kdcache.losses.ranking_terms`` and ``kdcache.losses.embedding_terms``.

Shape suffixes: P flat rows, C outputs of a row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdcache.losses.chunked import at_least_float32
from kdcache.losses.context import TeacherContext
from kdcache.losses.terms import LayerStates, Needs, Outputs, Term, TermModule


class OutputTerm(Term):
    """Base of terms without parameters over the outputs at a row."""

    needs = "the teacher's raw outputs"
    same_width: ClassVar[bool] = False
    """Whether the outputs of student and teacher have to be equally wide."""

    @abstractmethod
    def compare(self, outputs: Outputs) -> Tensor:
        """Return the value of each row, [P]; outputs are in float32 at least."""

    def refusal(self, context: TeacherContext) -> str | None:
        """Return why the term makes no sense with such a cache and what to do instead; None if it does."""
        if context.outputs is not None:
            return None
        needs = self.needs.removeprefix("nothing: ")  # of the teacher
        return f"it needs {needs}, and the cache holds {context.holds}; caches of tasks about tokens have none"

    def build(self, context: TeacherContext, student_widths: Sequence[int], generator: torch.Generator) -> TermModule:
        """Return the module, which has nothing to learn."""
        return OutputModule(self)


class OutputModule(TermModule):
    """A term over outputs as a module."""

    needs = Needs(outputs=True)

    def __init__(self, term: OutputTerm) -> None:
        super().__init__()
        self._term = term

    def forward(self, states: LayerStates) -> Tensor:
        """Return the value of each row, [P]."""
        outputs = states.outputs
        assert outputs is not None
        student_PC = at_least_float32(outputs.student_PC)
        return self._term.compare(outputs.with_student(student_PC))

    def describe(self) -> dict[str, object]:
        """Return nothing: nothing was decided."""
        return {}


class OutputMSE(OutputTerm):
    """Mean squared error of the outputs, the mean over the width."""

    same_width: ClassVar[bool] = True

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error of each row, [P]."""
        return (outputs.student_PC - outputs.teacher_PC).square().mean(1)


class OutputCosine(OutputTerm):
    """1 - cosine of the outputs: their direction, whatever their length."""

    same_width: ClassVar[bool] = True

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the distance of each row, [P]."""
        return 1 - nn.functional.cosine_similarity(outputs.student_PC, outputs.teacher_PC, dim=1)


class LabelMSE(OutputTerm):
    """Squared error of the student's score and the corpus's own; 0 where the corpus has none.

    The teacher plays no part: it is the loss that a regressor is trained on without distillation.
    """

    needs = "nothing: the corpus's own numbers"
    uses_teacher = False

    def refusal(self, context: TeacherContext) -> str | None:
        """Return why the term makes no sense with such a cache and what to do instead; None if it does."""
        if context.outputs is not None and context.outputs.width > 1:
            return f"it compares one score with one number, and the outputs are {context.outputs.width} wide"
        return super().refusal(context)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error of each row, [P]."""
        labels_P = outputs.labels_P
        errors_P = (outputs.student_PC[:, 0] - labels_P.nan_to_num()).square()
        return torch.where(labels_P.isnan(), 0.0, errors_P)
