"""Compare student and teacher on a small sample of the cache, before the first step.

The sample is the beginning of the training order (after filters and curricula), so it is what the student will see
first, and it is the same at every start. The student's losses are computed with dropout off; the teacher's come from
the cache. Only positions whose loss mask is 1 count. At 2,000 positions the mean of a loss is uncertain by a few
percent, but student and teacher are compared on the same positions.

Shape suffixes: P flat positions, G grid temperatures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdcache.cache import Cache
from kdcache.cache.batches import MicroBatches
from kdcache.config import Config
from kdcache.losses import Objective, Select, TeacherRows, score_positions
from kdcache.models.batching import batches_in_order
from kdcache.models.trying import in_eval_mode
from kdcache.step import StepInputs
from kdcache.train.module import Distiller

#: Least number of positions of the sample, if the cache has as many.
SAMPLE_POSITIONS = 2048

Batch = dict[str, Tensor]


class SampleReport(Config):
    """Means over ``num_positions`` positions of ``num_sequences`` sequences, in nats per position."""

    num_sequences: int
    num_positions: int
    teacher_loss: float | None
    student_loss: float | None
    """None where the corpus has no labels, or the task no distributions."""


@dataclass
class Measured:
    """Sums over the valid positions of a sample.

    ``teacher_sum`` (None: the cache does not store it) and ``student_sum`` are of the losses, ``term_sums`` of the
    terms of the objective, ``selected_sums`` of the positions that a term selects, ``tail_sums_G`` of the teacher's
    tail mass at the cache's other temperatures.
    """

    num_sequences: int = 0
    num_positions: int = 0
    num_labelled: int = 0
    teacher_sum: float | None = 0.0
    student_sum: float = 0.0
    term_sums: dict[str, float] = field(default_factory=dict)
    selected_sums: dict[str, float] = field(default_factory=dict)
    tail_sums_G: list[float] = field(default_factory=list)

    @property
    def report(self) -> SampleReport:
        """The losses of student and teacher."""
        return SampleReport(
            num_sequences=self.num_sequences,
            num_positions=self.num_positions,
            teacher_loss=None
            if self.teacher_sum is None or not self.num_labelled
            else self.teacher_sum / self.num_labelled,
            student_loss=self.student_sum / self.num_labelled if self.num_labelled else None,
        )

    def mean(self, total: float) -> float:
        """Return a sum per position."""
        return total / max(self.num_positions, 1)


def first_batches(cache: Cache, batches: MicroBatches, *, num_positions: int, batch_positions: int) -> list[list[int]]:
    """Return the first sequences of the training order as lists of sequence numbers.

    Together they have ``num_positions`` positions or a few more; a list has at most as many sequences as a
    micro-batch and, padded, ``batch_positions`` positions, but one sequence at least.
    """
    sizes_N = cache.sizes_N
    first: list[int] = []
    total = 0
    for index in (index for micro_batch in batches for index in micro_batch):
        first.append(index)
        total += int(sizes_N[index])
        if total >= num_positions:
            break
    return batches_in_order(first, sizes_N, batch_positions, max_sequences=batches.batch_sequences)


@torch.no_grad()
def measure(
    module: Distiller, batches: Sequence[Batch], autocast: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Measured:
    """Return the sums of student, teacher and every term of the objective over collated ``batches``."""
    objective = module.objective
    measured = Measured(tail_sums_G=[0.0] * len(objective.context.temperatures))
    with in_eval_mode(module):
        for batch in batches:
            with autocast():
                inputs = module.inputs(batch)
                _add(measured, _student_values(module, inputs), batch)
                if objective.config.terms:
                    _add_terms(measured, module, inputs)
            _add_selected(measured, objective, inputs.rows)
    return measured


def _student_values(module: Distiller, inputs: StepInputs) -> dict[str, Tensor]:
    """Return the value of each loss at every position, [P], and the student's own loss under the empty name.

    As in training, a loss that looks at selected positions only is 0 at the others.
    """
    objective = module.objective
    if objective.context.kind == "outputs":
        return {}
    rows, losses, head = inputs.rows, objective.losses, module.student.head
    scores = score_positions(inputs.hidden_PD, head, rows, losses, context=objective.context)
    values = {name: _selected(values_P, losses[name].select, rows) for name, values_P in scores.losses.items()}
    return values | {"": -scores.gold_logprob_P}


def _selected(values_P: Tensor, select: Select | None, rows: TeacherRows) -> Tensor:
    return values_P if select is None else select.keep(values_P, rows)


def _add(measured: Measured, values: Mapping[str, Tensor], batch: Batch) -> None:
    valid_P = batch["loss_mask"]
    is_labelled_P = valid_P & (batch["labels"] >= 0)

    def total(value_P: Tensor, where_P: Tensor = valid_P) -> float:
        return float(value_P[where_P].sum(dtype=torch.float64))

    measured.num_sequences += len(batch["input_ids"])
    measured.num_positions += int(valid_P.sum())
    if values:
        measured.num_labelled += int(is_labelled_P.sum())
        if measured.teacher_sum is not None and "teacher_gold_logprob" in batch:
            measured.teacher_sum -= total(batch["teacher_gold_logprob"], is_labelled_P)
        else:
            measured.teacher_sum = None
        measured.student_sum += total(values[""], is_labelled_P)
    for name in values.keys() - {""}:
        measured.term_sums[name] = measured.term_sums.get(name, 0.0) + total(values[name])
    for column in range(len(measured.tail_sums_G)):
        measured.tail_sums_G[column] += total(batch["teacher_log_tails"][:, column].exp())


def _add_selected(measured: Measured, objective: Objective, rows: TeacherRows) -> None:
    for name, part in objective.config.parts.items():
        if part.select is not None:
            count = int((part.select.mask(rows) & rows.loss_mask_P).sum())
            measured.selected_sums[name] = measured.selected_sums.get(name, 0.0) + count


def _add_terms(measured: Measured, module: Distiller, inputs: StepInputs) -> None:
    """Add the terms, which compare other outputs than a position's logits."""
    sums = inputs.loss(module.objective, module.student, inputs.rows.loss_mask_P.sum()).sums
    for name in module.objective.config.terms:
        measured.term_sums[name] = measured.term_sums.get(name, 0.0) + float(sums[name])
