"""Base classes of losses and terms, the two kinds of parts that an objective sums.

- A `Loss` is a frozen configuration with a formula: from a `ChunkView`, student and teacher at a few positions, to one
  value per position, in nats. It has no parameters to train.
- A `Term` compares other outputs of the student, hidden states or raw outputs, for a whole micro-batch at once. It may
  have parameters, such as a projection between spaces of different width. The `Term` is the configuration; `Term.build`
  makes the `TermModule` for one cache and one student.

Parts do not mask, weight or average; `Objective` does that, once. A part that needs more than the cache stores is
rejected before training, with what to do instead (`incompatibility`, `Part.check`). Nothing is approximated silently.

Weights and other numbers may be schedules, and a selection may restrict a part to some positions. Formulas see neither:
`values` and `incompatibility` are called on the result of `Part.at`, in which all settings are numbers, and
`selected_values` sets the other positions to 0.

A `TermModule` declares in ``needs`` what it reads: hidden states of either model, raw outputs, or other fields of the
cache, whose kind another package may bring. Nothing else is computed, decoded or moved.

Shape suffixes: C positions of a chunk, P flat positions, D width of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError, StudentError
from kdcache.losses.schedules import Scheduled, Weight
from kdcache.losses.selection import Select
from kdcache.losses.teacher import Fact, TeacherContext
from kdcache.losses.view import ChunkView
from kdcache.schema import OUTPUTS_FIELD, layer_field


class Part(Scheduled, ABC):
    """Base class of losses and terms.

    ``weight`` is the factor in the objective; 0 measures the part without training on it. ``select`` restricts the part
    to some positions (default: all).
    """

    needs: ClassVar[str]
    """Description of what the part is computed from: the teacher's targets, or the corpus if not ``uses_teacher``."""

    uses_teacher: ClassVar[bool] = True
    """Whether the part reads the teacher's targets."""

    needs_facts: ClassVar[tuple[Fact, ...]] = ()
    """What the cache must store (`TeacherContext.has`)."""

    weight: Weight
    select: Select | None = None

    @property
    def sources(self) -> str:
        """Description of what the part is computed from, for reports."""
        return self.needs if self.uses_teacher else f"{self.needs}; nothing of the teacher"

    @abstractmethod
    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the part cannot be used with such a cache, and what to do instead; None if it can."""

    def check(self, context: TeacherContext, name: str) -> None:
        """Raise ``ConfigError``, naming the part, if it cannot be used with such a cache."""
        reason = incompatibility(self, context)
        if reason is not None:
            raise ConfigError(f"{name}: {reason}")


class Loss(Part):
    """Base class of losses."""

    is_divergence: ClassVar[bool]
    """Whether the loss is 0 exactly if student and teacher agree on the K + 1 outcomes."""

    needs = "the probabilities of the kept ids and of their tail"
    needs_facts: ClassVar[tuple[Fact, ...]] = ("vocabulary_probabilities",)

    ignores_samples: ClassVar[bool] = False
    """Whether the loss ignores samples and reads only the exact kept ids (see ``TeacherContext.num_kept``)."""

    @abstractmethod
    def values(self, view: ChunkView) -> Tensor:
        """Return the unweighted loss of each position, [C]."""

    def selected_values(self, view: ChunkView) -> Tensor:
        """Return the unweighted loss of each selected position and 0 at the others, [C]."""
        values_C = self.values(view)
        return values_C if self.select is None else self.select.keep(values_C, view.teacher)

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the loss cannot be used with such a cache, and what to do instead; None if it can.

        The default rejects samples: only a loss that is linear in the teacher's probabilities may use an estimate.
        """
        if not context.is_sampled or (self.ignores_samples and context.num_kept):
            return context.lacks(*self.needs_facts)
        kinds = "top-k, hybrid or hidden" if self.ignores_samples else "top-k or hidden"
        return f"it needs {self.needs}, and the cache holds {context.holds}; use a cache of {kinds} targets"


def incompatibility(part: Part, context: TeacherContext) -> str | None:
    """Return why ``part`` cannot be used with a cache of this ``context``, and what to do instead; None if it can.

    A part with schedules is checked over the whole run.
    """
    if context.kind == "outputs" and (isinstance(part, Loss) or part.select is not None):
        return f"it needs a distribution at every position, and the cache holds {context.holds}; use terms over outputs"
    for progress in part.sample_points():
        reason = part.at(progress).incompatibility(context)
        if reason is not None:
            return reason + (f" (reached by a schedule, at {progress:.0%} of the run)" if part.schedules else "")
    return None if part.select is None else part.select.incompatibility(context)


@dataclass(frozen=True)
class Needs:
    """What terms read: layers of either model (0: the embeddings, n: after block n), raw outputs, other fields."""

    student_layers: frozenset[int] = frozenset()
    teacher_layers: frozenset[int] = frozenset()
    outputs: bool = False
    """Whether the raw outputs of both models are read."""
    fields: frozenset[str] = frozenset()
    """Names of other fields of the cache, whose kind another package may bring."""

    @property
    def teacher_fields(self) -> tuple[str, ...]:
        """Names of the cache's fields that are needed."""
        layers = tuple(layer_field(layer) for layer in sorted(self.teacher_layers))
        return (*layers, *((OUTPUTS_FIELD,) if self.outputs else ()), *sorted(self.fields))

    @staticmethod
    def union(needs: Iterable[Needs]) -> Needs:
        """Return the union of ``needs``."""
        every = list(needs)
        return Needs(
            frozenset().union(*(item.student_layers for item in every)),
            frozenset().union(*(item.teacher_layers for item in every)),
            any(item.outputs for item in every),
            frozenset().union(*(item.fields for item in every)),
        )


@dataclass(frozen=True)
class Outputs:
    """Raw outputs [P, C] of student and teacher, with the label and the sequence of every position.

    ``labels_P`` float32, NaN where there is none. ``groups_P`` int64: positions of one sequence (a query's documents,
    the texts of a pair) have the same number and are next to each other.
    """

    student_PC: Tensor
    teacher_PC: Tensor
    labels_P: Tensor
    groups_P: Tensor

    def with_student(self, student_PC: Tensor) -> Outputs:
        """Return a copy with other outputs of the student, with all numbers in their dtype."""
        dtype = student_PC.dtype
        return replace(
            self, student_PC=student_PC, teacher_PC=self.teacher_PC.to(dtype), labels_P=self.labels_P.to(dtype)
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """Return a copy with ``change`` applied to every tensor."""
        return Outputs(*(change(getattr(self, item.name)) for item in fields(self)))


@dataclass(frozen=True)
class LayerStates:
    """Hidden states [P, D] of student and teacher at the same P positions, by layer number; raw outputs; other fields.

    ``fields`` are the tensors that the kinds of other fields collate, by name, with P rows each.
    """

    student: Mapping[int, Tensor]
    teacher: Mapping[int, Tensor]
    outputs: Outputs | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_batch(
        cls,
        student: Mapping[int, Tensor],
        batch: Mapping[str, Tensor],
        needs: Needs,
        student_outputs: Tensor | None = None,
    ) -> LayerStates:
        """Combine the student's states with the teacher's of a batch; raises ``ConfigError`` for missing keys."""
        missing = [name for name in needs.teacher_fields if name not in batch]
        if missing:
            raise ConfigError(
                f"the objective needs {', '.join(missing)} in every training batch, found {', '.join(batch)}; read "
                "these fields of the cache too"
            )
        teacher = {layer: batch[layer_field(layer)] for layer in sorted(needs.teacher_layers)}
        others = {name: batch[name] for name in sorted(needs.fields)}
        if not needs.outputs:
            return cls(student, teacher, fields=others)
        assert student_outputs is not None
        teacher_PC = batch[OUTPUTS_FIELD]
        unknown_P = torch.full_like(teacher_PC[:, 0], torch.nan)
        each_P = torch.arange(len(teacher_PC), device=teacher_PC.device)
        labels_P, groups_P = batch.get("label_values", unknown_P), batch.get("groups", each_P)
        return cls(student, teacher, Outputs(student_outputs, teacher_PC, labels_P, groups_P), others)

    def check(self, num_positions: int) -> None:
        """Raise ``StudentError`` unless every layer has one state for each of the ``num_positions``."""
        for whose, states in (("student", self.student), ("teacher", self.teacher)):
            for layer, states_PD in states.items():
                if states_PD.shape[0] != num_positions:
                    raise StudentError(
                        f"layer {layer} of the {whose} has {states_PD.shape[0]} states for {num_positions} positions "
                        "of the teacher; select the real positions (the batch's 'rows') first"
                    )

    def select(self, rows_P: Tensor) -> LayerStates:
        """Return the states at the positions with the given int64 indices, in that order."""
        student, teacher = (
            {layer: states_PD.index_select(0, rows_P) for layer, states_PD in states.items()}
            for states in (self.student, self.teacher)
        )
        outputs = None if self.outputs is None else self.outputs.each(lambda tensor: tensor.index_select(0, rows_P))
        others = {name: tensor.index_select(0, rows_P) for name, tensor in self.fields.items()}
        return LayerStates(student, teacher, outputs, others)


class TermModule(nn.Module, ABC):
    """A term built for one cache and one student, with its parameters (float32 for students of all dtypes)."""

    needs: Needs

    @abstractmethod
    def forward(self, states: LayerStates) -> Tensor:
        """Return the unweighted value at each position, [P], in float32 or float64."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return the choices made when the term was built, in plain JSON types, for the record of the run."""


class Term(Part):
    """Base class of the configuration of terms.

    At weight 0 a term is measured and not trained on: its parameters have a gradient of 0, and only the optimiser's
    weight decay and momentum move them.
    """

    needs_pairs: ClassVar[bool] = False
    """Whether the term compares pairs of texts, and is 0 without them."""

    @abstractmethod
    def build(self, context: TeacherContext, student_widths: Sequence[int], generator: torch.Generator) -> TermModule:
        """Return the module for such a cache and a student whose states 0, 1, ..., n have these widths.

        Parameters are initialised from ``generator`` alone. Raises ``ConfigError`` if the student is incompatible.
        """


def build_terms(
    terms: Mapping[str, Term], context: TeacherContext, student_widths: Sequence[int], seed: int
) -> nn.ModuleDict:
    """Return the modules of ``terms`` by name; raises ``ConfigError``, naming the term, for an incompatible student.

    Each has a generator of its own, seeded with ``seed``: initial parameters are the same on every rank and in a
    resumed run, and neither dropout nor the data order of a run depends on whether there are terms.
    """
    modules = nn.ModuleDict()
    for name, term in terms.items():
        term.check(context, name)
        try:
            modules[name] = term.build(context, student_widths, torch.Generator().manual_seed(seed))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return modules


def weighted_terms(
    modules: nn.ModuleDict, terms: Mapping[str, Term], states: LayerStates, masks: Mapping[str, Tensor]
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """Return the sum over positions and terms of weight x value, and each term's own unweighted, detached sum.

    ``terms`` are the current settings (`Term.at`), ``masks`` [P] bool the positions of each. Every parameter gets a
    gradient, 0 if there are no positions or the weight is 0: distributed data parallelism waits for all of them in
    every micro-batch.
    """
    total: Tensor | float = 0.0
    sums = {}
    for name, module in modules.items():
        weight, mask_P = terms[name].weight, masks[name]
        # Under autocast the projections would run with 8 bits of mantissa, although they cost next to nothing.
        autocast_off = torch.autocast(mask_P.device.type, enabled=False)
        with autocast_off, torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            # Other positions are left out, not multiplied by 0: their values may be NaN.
            value = module(states if mask_P.all() else states.select(mask_P.nonzero().squeeze(1))).sum()
        sums[name] = value.detach()
        total = total + (weight * value if weight > 0 else untouched(module.parameters()))
    return total, sums


def untouched(tensors: Iterable[Tensor]) -> Tensor | float:
    """Return 0, with a gradient of 0 for each of the tensors that requires one."""
    return sum((0.0 * tensor.sum() for tensor in tensors if tensor.requires_grad), start=0.0)
