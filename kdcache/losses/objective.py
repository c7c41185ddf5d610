"""The objective: which losses with which weights, and the only place that masks, weights and averages.

The denominator is one number for the whole optimiser step: the valid positions of all micro-batches and all ranks,
given by the caller. A mean per micro-batch would weigh short batches as much as long ones, and the gradient would
change with padding, batch composition, gradient accumulation and the number of processes.

Shape suffixes: P flat positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import create_model, model_validator
from torch import Tensor

from kdcache.config import Config, merge
from kdcache.errors import ConfigError, StudentError
from kdcache.losses.base import Loss
from kdcache.losses.chunked import Work, default_chunk_positions, weighted_sum
from kdcache.losses.context import TeacherContext
from kdcache.losses.divergences import LOSSES
from kdcache.losses.teacher_rows import TeacherRows
from kdcache.models.lm_head import LMHead

DEFAULT_WEIGHTS: dict[str, Any] = {"forward_kl": {"weight": 0.9}, "cross_entropy": {"weight": 0.1}}

# One optional field per row of the table; typed Any because a checker cannot follow fields that a table made.
_FIELDS: dict[str, Any] = {name: (loss | None, None) for name, loss in LOSSES.items()}
_OneFieldPerLoss: Any = create_model("_OneFieldPerLoss", __base__=Config, **_FIELDS)


class ObjectiveConfig(_OneFieldPerLoss):
    """Losses by name, such as ``{forward_kl: {weight: 0.9, temperature: 2}, cross_entropy: {weight: 0.1}}``.

    Whoever gives a weight gives them all: a loss that is not named is then off, and a named one without a weight is
    an error. As long as no weight is given, the default weights stand (forward_kl 0.9, cross_entropy 0.1) and other
    settings refine them, so ``--set objective.forward_kl.temperature=2`` changes the temperature and nothing else.
    ``null`` switches a loss off. Weight 0 means measured but not trained on.
    """

    @model_validator(mode="before")
    @classmethod
    def _use_default_weights(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or any(_states_weight(value) for value in data.values()):
            return data
        return merge(DEFAULT_WEIGHTS, data)

    @model_validator(mode="after")
    def _trains_on_something(self) -> ObjectiveConfig:
        if not any(loss.weight > 0 for loss in self.losses.values()):
            raise ValueError(f"at least one of {', '.join(LOSSES)} needs a weight above 0")
        return self

    @property
    def losses(self) -> dict[str, Loss]:
        """The losses that are on, in the order of the table."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name) is not None}


@dataclass(frozen=True)
class ObjectiveOutput:
    """``loss`` to call backward on; ``sums`` of each loss over ``num_valid`` positions, unweighted, detached."""

    loss: Tensor
    sums: dict[str, Tensor]
    num_valid: int


class Objective:
    """Compute a training loss from hidden states, an LM head and the teacher's rows.

    ``chunk_positions`` is how many positions go through the head at once: more is faster on an accelerator and takes
    more memory (default: by device). ``context`` says what kind of cache the rows come from (default: top-k, K ids in
    every row); raises ``ConfigError`` when a loss needs what such a cache does not hold.
    """

    def __init__(
        self,
        config: ObjectiveConfig | None = None,
        *,
        chunk_positions: int | None = None,
        context: TeacherContext | None = None,
    ) -> None:
        if chunk_positions is not None and chunk_positions < 1:
            raise ConfigError(f"chunk_positions must be at least 1, found {chunk_positions}")
        self.config = config if config is not None else ObjectiveConfig()
        self.losses = self.config.losses
        self.chunk_positions = chunk_positions
        self.context = context if context is not None else TeacherContext()
        for name, loss in self.losses.items():
            loss.check(self.context, name)

    def __call__(
        self, hidden_PD: Tensor, head: LMHead, teacher: TeacherRows, num_valid: float | Tensor
    ) -> ObjectiveOutput:
        """Return sum over losses and valid positions of weight x value, divided by ``num_valid``.

        ``num_valid`` counts the valid positions of the whole optimiser step (number or 0-d tensor; 0 gives loss 0).
        Without valid positions the loss is 0, its gradients are 0, and backward still works. Raises ``StudentError``
        when the rows do not belong to the student: other positions, or ids outside its or the teacher's vocabulary.
        """
        check_positions(hidden_PD, teacher)
        rows_P = teacher.loss_mask_P.nonzero().squeeze(1)
        if len(rows_P) < teacher.num_positions:
            hidden_PD, teacher = hidden_PD.index_select(0, rows_P), teacher.select(rows_P)
        check_ids(head, teacher, self.context)
        chunk_positions = self.chunk_positions or default_chunk_positions(hidden_PD.device)
        self.context = self.context.to(hidden_PD.device)
        total, sums = weighted_sum(hidden_PD, Work(self.losses, teacher, head, chunk_positions, self.context))
        return ObjectiveOutput(total / _denominator(num_valid), sums, len(rows_P))


def check_positions(hidden_PD: Tensor, teacher: TeacherRows) -> None:
    """Raise ``StudentError`` unless there is one hidden state for each of the teacher's rows."""
    if hidden_PD.shape[0] != teacher.num_positions:
        raise StudentError(
            f"the teacher has {teacher.num_positions} rows for {hidden_PD.shape[0]} hidden states; select the real "
            "positions (the batch's 'rows') from the student's hidden states first"
        )


def check_ids(head: LMHead, teacher: TeacherRows, context: TeacherContext) -> None:
    """Raise ``StudentError`` unless all ids and labels of the rows are in the vocabularies they belong to.

    The student has to have every id of the teacher's vocabulary, and may have more.
    """
    vocab_size = head.vocab_size if context.vocab_size is None else context.vocab_size
    if vocab_size > head.vocab_size:
        raise StudentError(
            f"the student's LM head must have a row for each of the teacher's {vocab_size} ids, found "
            f"{head.vocab_size}. Teacher and student must share one tokenizer"
        )
    limits = {"teacher_ids": (teacher.ids_PK, vocab_size), "labels": (teacher.labels_P, head.vocab_size)}
    checked = {name: (tensor, size) for name, (tensor, size) in limits.items() if tensor.numel()}
    if not checked:
        return
    # One transfer from the device for both checks; an id out of range would otherwise abort a CUDA process.
    extremes = torch.stack([bound for tensor, _ in checked.values() for bound in tensor.aminmax()]).tolist()
    for (name, (_, size)), low, high in zip(checked.items(), extremes[::2], extremes[1::2], strict=True):
        if low < 0 or high >= size:
            whose = "teacher" if size < head.vocab_size else "student"
            raise StudentError(
                f"{name} must lie in 0..{size - 1}, the {whose}'s vocabulary; found {low}..{high}. "
                "Teacher and student must share one tokenizer"
            )


def _states_weight(value: Any) -> bool:
    return isinstance(value, Loss) or (isinstance(value, Mapping) and "weight" in value)


def _denominator(num_valid: float | Tensor) -> float | Tensor:
    # Infinity where nothing is valid: the quotient and its gradient are then 0 rather than NaN.
    if isinstance(num_valid, Tensor):
        return torch.where(num_valid > 0, num_valid, torch.inf)
    return num_valid if num_valid > 0 else torch.inf
