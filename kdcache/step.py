"""Inputs of the loss in one step: the student's hidden states and the teacher's targets for one micro-batch.

Training, the report before it, its dry run, the estimate of memory, timing and evaluation all run a student through
`StepInputs.of`, and so can a loop of your own. Code that belongs to the forward pass of a step, such as reducing the
teacher's embeddings to the student's width, is called only here.

Shape suffixes: P flat positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.losses import LayerStates, Needs, Objective, ObjectiveOutput, TeacherRows
from kdcache.students import Student


@dataclass(frozen=True)
class StepInputs:
    """Hidden states [P, D] of the student, the teacher's rows, and the states of layers that terms compare.

    All have the same P positions, in the same order.
    """

    hidden_PD: Tensor
    rows: TeacherRows
    states: LayerStates

    @classmethod
    def of(cls, student: Student, batch: Mapping[str, Tensor], needs: Needs | None = None) -> StepInputs:
        """Run ``student`` on a collated batch.

        ``needs`` says which layers' states and raw outputs are wanted too (default: none). Raises ``ConfigError`` when
        the batch lacks one of the teacher's fields in ``needs``.
        """
        needs = Needs() if needs is None else needs
        hidden_PD, student_states = student.states(batch, needs.student_layers)
        if student.sentence is not None:
            batch = student.sentence.with_reduced(batch)
        states = LayerStates.from_batch(student_states, batch, needs, hidden_PD)
        return cls(hidden_PD, TeacherRows.from_batch(batch), states)

    @property
    def num_positions(self) -> int:
        """Number of positions, P."""
        return self.rows.num_positions

    def loss(self, objective: Objective, student: Student, num_valid: float | Tensor) -> ObjectiveOutput:
        """Call ``objective`` on these inputs and the student's head; ``num_valid`` is that of `Objective`."""
        return objective(self.hidden_PD, student.head, self.rows, num_valid, self.states)

    def backward(
        self, objective: Objective, student: Student, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Run ``objective`` forward and backward, as if these positions were the whole step."""
        with autocast():
            output = self.loss(objective, student, self.num_positions)
        output.loss.backward()

    def leaves(self, count: int | None = None) -> StepInputs:
        """Return the first ``count`` positions (default: all) as leaves of a new graph; all of them are valid.

        The objective can then run forward and backward on its own, down to the hidden states and the LM head.
        """
        count = self.num_positions if count is None else min(count, self.num_positions)
        hidden_PD = self.hidden_PD[:count].detach().requires_grad_()
        rows = self.rows.slice(0, count)
        rows = replace(rows, loss_mask_P=torch.ones_like(rows.loss_mask_P))
        student, teacher = (
            {layer: states_PD[:count].detach().requires_grad_() for layer, states_PD in states.items()}
            for states in (self.states.student, self.states.teacher)
        )
        outputs = self.states.outputs
        if outputs is not None:
            outputs = replace(outputs.each(lambda tensor: tensor[:count]), student_PC=hidden_PD)
        fields = {name: tensor[:count] for name, tensor in self.states.fields.items()}
        return StepInputs(hidden_PD, rows, LayerStates(student, teacher, outputs, fields))
