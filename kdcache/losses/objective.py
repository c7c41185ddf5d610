"""`Objective`: the weighted sum of losses and terms; the only place that masks, weights and averages.

The denominator is one number for the whole optimiser step: the valid positions of all micro-batches and all ranks,
given by the caller. A mean per micro-batch would give short batches the same weight as long ones, and the gradient
would depend on padding, batch composition, gradient accumulation and the number of processes. The denominator of a loss
at selected positions is the same; only its sum is over fewer positions.

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

    For a loss at selected positions, ``sums`` also has their number, under ``<name>_selected``.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    num_valid: int


class Objective:
    """Compute a training loss from hidden states, an LM head and the teacher's rows.

    ``chunk_positions`` is the number of positions that go through the head at once: more is faster on an accelerator
    and takes more memory (default: by device). ``context`` describes the cache of the rows (default: top-k, K ids in
    every row). Raises ``ConfigError`` if a loss is incompatible with such a cache, or selects a share of positions that
    `ObjectiveConfig.resolve` has not converted to a bound.

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
        """Build the modules of all terms, ``terms``, for a student whose states 0, 1, ..., n have these widths.

        ``seed`` determines their initial parameters. Raises ``ConfigError`` if a term is incompatible with the student.
        """
        self.terms = build_terms(self.config.terms, self.context, student_widths, seed)

    @property
    def needs(self) -> Needs:
        """What `__call__` needs in ``states``, for the terms that have been built."""
        return Needs.union(cast(TermModule, module).needs for module in self.terms.values())

    @property
    def losses(self) -> dict[str, Loss]:
        """The losses with their current weights and temperatures."""
        return {name: loss.at(self.progress) for name, loss in self.config.losses.items()}

    @property
    def scheduled(self) -> dict[str, float]:
        """The current values of all schedules, such as ``forward_kl_weight``."""
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
        Without valid positions the loss and its gradients are 0, and backward still works. Raises ``StudentError`` if
        the rows do not match the student: another number of positions, or ids outside its or the teacher's vocabulary.
        ``states`` are the hidden states and outputs in ``needs``; only terms use them.
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
    """Raise ``StudentError`` unless all ids are in the teacher's vocabulary and all labels in the student's.

    The student must have every id of the teacher's vocabulary, and may have more.
    """
    if context.kind == "outputs":
        return  # such caches have no ids
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
    # One transfer from the device for both checks; an id out of range would abort a CUDA process.
    extremes = torch.stack([bound for tensor, *_ in checked.values() for bound in tensor.aminmax()]).tolist()
    for (name, (_, size, least)), low, high in zip(checked.items(), extremes[::2], extremes[1::2], strict=True):
        if low < least or high >= size:
            whose = "teacher" if size < head.vocab_size else "student"
            raise StudentError(
                f"{name} must lie in 0..{size - 1}, the {whose}'s vocabulary; found {low}..{high}. "
                "Teacher and student must share one tokenizer"
            )


def _selected(parts: Mapping[str, Part], teacher: TeacherRows) -> dict[str, Tensor]:
    """Return the valid positions, [P] bool, of each part that has a selection."""
    selecting = {name: part.select for name, part in parts.items() if part.select is not None}
    return {name: select.mask(teacher) & teacher.loss_mask_P for name, select in selecting.items()}


def _needed(losses: Mapping[str, Loss], selected: Mapping[str, Tensor], teacher: TeacherRows) -> Tensor:
    """Return the valid positions, [P] bool, of any loss: only these go through the LM head."""
    masks = [selected[name] for name in losses if name in selected]
    if not masks or len(masks) < len(losses):
        return teacher.loss_mask_P
    return torch.stack(masks).any(0)


def _untrained(hidden_PD: Tensor, head: LMHead) -> Tensor:
    """Return 0, with a gradient of 0 for the hidden states and the LM head, which only losses train.

    Distributed data parallelism waits for the gradient of every parameter.
    """
    parameters = [hidden_PD, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]
    return hidden_PD.new_zeros(()) + untouched(parameters)


def _denominator(num_valid: float | Tensor) -> float | Tensor:
    # Infinity if no position is valid: the quotient and its gradient are then 0 rather than NaN.
    if isinstance(num_valid, Tensor):
        return torch.where(num_valid > 0, num_valid, torch.inf)
    return num_valid if num_valid > 0 else torch.inf
