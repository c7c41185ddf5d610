"""The objective: which losses with which weights, and the only place that masks, weights and averages.

The denominator is one number for the whole optimiser step: the valid positions of all micro-batches and all ranks,
given by the caller. A mean per micro-batch would weigh short batches as much as long ones, and the gradient would
change with padding, batch composition, gradient accumulation and the number of processes. That holds for a loss that
looks at selected positions only, too: its sum is over fewer, and the denominator is the same.

Shape suffixes: P flat positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError, StudentError
from kdcache.losses.base import LayerStates, Loss, Needs, Part, Term, TermModule, build_terms, untouched, weighted_terms
from kdcache.losses.config import ObjectiveConfig
from kdcache.losses.kernel import Work, default_chunk_positions, weighted_sum
from kdcache.losses.teacher import TeacherContext, TeacherRows
from kdcache.models.lm_head import LMHead
from kdcache.schema import NO_LABEL


@dataclass(frozen=True)
class ObjectiveOutput:
    """``loss`` to call backward on; ``sums`` of each loss over ``num_valid`` positions, unweighted, detached.

    A loss that looks at selected positions only is 0 at the others; beside its sum stands their number, under
    ``<name>_selected``.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    num_valid: int


class Objective:
    """Compute a training loss from hidden states, an LM head and the teacher's rows.

    ``chunk_positions`` is how many positions go through the head at once: more is faster on an accelerator and takes
    more memory (default: by device). ``context`` says what kind of cache the rows come from (default: top-k, K ids in
    every row); raises ``ConfigError`` when a loss needs what such a cache does not hold, or selects a share of
    positions that `ObjectiveConfig.resolve` has not turned into a bound.

    Set ``progress`` before every optimiser step, from 0 at the first to 1 at the last: schedules are functions of it.
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
        self.progress = 0.0
        self.chunk_positions = chunk_positions
        self.context = context if context is not None else TeacherContext()
        self.terms = nn.ModuleDict()
        for name, part in self.config.parts.items():
            part.check(self.context, name)
            if part.select is not None:
                part.select.check_resolved()

    def build_terms(self, student_widths: Sequence[int], seed: int) -> None:
        """Make the modules of all terms, ``terms``, for a student whose states 0, 1, ..., n have these widths.

        ``seed`` decides their parameters. Raises ``ConfigError`` when a term does not fit the student.
        """
        self.terms = build_terms(self.config.terms, self.context, student_widths, seed)

    @property
    def needs(self) -> Needs:
        """The layers whose states `__call__` wants, of the terms that have been built."""
        return Needs.union(cast(TermModule, module).needs for module in self.terms.values())

    @property
    def losses(self) -> dict[str, Loss]:
        """The losses with the weights and temperatures of this moment."""
        return {name: loss.at(self.progress) for name, loss in self.config.losses.items()}

    @property
    def scheduled(self) -> dict[str, float]:
        """What changes during the run, at this moment, such as ``forward_kl_weight``."""
        return {
            f"{name}_{setting}": schedule.at(self.progress)
            for name, part in self.config.parts.items()
            for setting, schedule in part.schedules.items()
        }

    def __call__(
        self,
        hidden_PD: Tensor,
        head: LMHead,
        teacher: TeacherRows,
        num_valid: float | Tensor,
        states: LayerStates | None = None,
    ) -> ObjectiveOutput:
        """Return sum over losses and valid positions of weight x value, divided by ``num_valid``.

        ``num_valid`` counts the valid positions of the whole optimiser step (number or 0-d tensor; 0 gives loss 0).
        Without valid positions the loss is 0, its gradients are 0, and backward still works. Raises ``StudentError``
        when the rows do not belong to the student: other positions, or ids outside its or the teacher's vocabulary.
        ``states`` are those of the layers in ``needs``; only terms want them.
        """
        check_positions(hidden_PD, teacher)
        losses = self.losses
        terms = {name: term.at(self.progress) for name, term in self.config.terms.items()}
        selected = _selected({**losses, **terms}, teacher)
        total_terms, sums_terms = self._sum_terms(terms, states, selected, teacher)
        num_here = int(teacher.loss_mask_P.sum())
        rows_P = _needed(losses, selected, teacher).nonzero().squeeze(1)
        if len(rows_P) < teacher.num_positions:
            hidden_PD, teacher = hidden_PD.index_select(0, rows_P), teacher.select(rows_P)
        check_ids(head, teacher, self.context)
        chunk_positions = self.chunk_positions or default_chunk_positions(hidden_PD.device, head.vocab_size)
        self.context = self.context.to(hidden_PD.device)
        work = Work(losses, teacher, head, chunk_positions, self.context)
        total, sums = weighted_sum(hidden_PD, work) if losses else (_untrained(hidden_PD, head), {})
        counts = {f"{name}_selected": mask_P.sum() for name, mask_P in selected.items()}
        return ObjectiveOutput((total + total_terms) / _denominator(num_valid), sums | sums_terms | counts, num_here)

    def _sum_terms(
        self,
        terms: Mapping[str, Term],
        states: LayerStates | None,
        selected: Mapping[str, Tensor],
        teacher: TeacherRows,
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        if not terms:
            return 0.0, {}
        if states is None or len(self.terms) < len(terms):
            raise ConfigError(
                f"{', '.join(terms)}: call build_terms with the student's widths first, and give the states of the "
                "layers in needs with every batch"
            )
        states.check(teacher.num_positions)
        masks = {name: selected.get(name, teacher.loss_mask_P) for name in terms}
        return weighted_terms(self.terms, terms, states, masks)


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
    if context.kind == "outputs":
        return  # numbers, and no ids
    vocab_size = head.vocab_size if context.vocab_size is None else context.vocab_size
    if vocab_size > head.vocab_size:
        raise StudentError(
            f"the student's LM head must have a row for each of the teacher's {vocab_size} ids, found "
            f"{head.vocab_size}. Teacher and student must share one tokenizer"
        )
    limits = {"teacher_ids": (teacher.ids_PK, vocab_size, 0), "labels": (teacher.labels_P, head.vocab_size, NO_LABEL)}
    checked = {name: limit for name, limit in limits.items() if limit[0].numel()}
    if not checked:
        return
    # One transfer from the device for both checks; an id out of range would otherwise abort a CUDA process.
    extremes = torch.stack([bound for tensor, *_ in checked.values() for bound in tensor.aminmax()]).tolist()
    for (name, (_, size, least)), low, high in zip(checked.items(), extremes[::2], extremes[1::2], strict=True):
        if low < least or high >= size:
            whose = "teacher" if size < head.vocab_size else "student"
            raise StudentError(
                f"{name} must lie in 0..{size - 1}, the {whose}'s vocabulary; found {low}..{high}. "
                "Teacher and student must share one tokenizer"
            )


def _selected(parts: Mapping[str, Part], teacher: TeacherRows) -> dict[str, Tensor]:
    """Return the valid positions, [P] bool, that each part looks at which does not look at all."""
    selecting = {name: part.select for name, part in parts.items() if part.select is not None}
    return {name: select.mask(teacher) & teacher.loss_mask_P for name, select in selecting.items()}


def _needed(losses: Mapping[str, Loss], selected: Mapping[str, Tensor], teacher: TeacherRows) -> Tensor:
    """Return the valid positions, [P] bool, that any loss looks at: no others need go through the LM head."""
    masks = [selected[name] for name in losses if name in selected]
    if not masks or len(masks) < len(losses):
        return teacher.loss_mask_P
    return torch.stack(masks).any(0)


def _untrained(hidden_PD: Tensor, head: LMHead) -> Tensor:
    """Return 0, with a gradient of 0 for what only losses train: the last layers and the LM head.

    Distributed data parallelism waits for the gradient of every parameter.
    """
    parameters = [hidden_PD, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]
    return hidden_PD.new_zeros(()) + untouched(parameters)


def _denominator(num_valid: float | Tensor) -> float | Tensor:
    # Infinity where nothing is valid: the quotient and its gradient are then 0 rather than NaN.
    if isinstance(num_valid, Tensor):
        return torch.where(num_valid > 0, num_valid, torch.inf)
    return num_valid if num_valid > 0 else torch.inf
