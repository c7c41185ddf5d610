"""A student and its objective as one module: what a distributed wrapper sees, and what the optimiser trains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdcache.losses import Objective, TeacherRows
from kdcache.students import Student
from kdcache.students.trainer import Distillation


class Distiller(Distillation):
    """A student and its objective as one module, so that distributed wrappers see a single forward."""

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__(student)
        self.objective = objective

    def forward(self, batch: Mapping[str, Tensor], num_valid: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
        hidden_PD = self.student.hidden(batch)
        result = self.objective(hidden_PD, self.student.head, TeacherRows.from_batch(batch), num_valid)
        return result.loss, result.sums, result.num_valid
