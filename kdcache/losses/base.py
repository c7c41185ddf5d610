"""Base classes of losses and terms, the two kinds of parts that an objective sums.

A `Loss` is its own settings and a formula over a `ChunkView`, which yields one value per position, in nats; it has
nothing to learn. A `Term` looks at other outputs of the student, of a whole micro-batch at once, because those are
[P, D] and small; and what it compares may live in spaces of different width, so it may own a map between them that is
trained with the student. A `Term` is therefore its settings, and `Term.build` makes the `TermModule` of one cache and
one student, which holds the parameters.

No part masks, weights or averages: `Objective` does that, once. What a part may use depends on the cache, and a part
that asks for more than the cache holds is refused before training (`allowed`, `Part.check`) with what to do instead;
nothing is approximated quietly.

The weight and other numbers may be schedules, and a selection may restrict a part to some positions. Neither is a
formula's business: `values` and `refusal` are only called on what `Part.at` returns, in which all are numbers, and
`selected_values` puts 0 at the other positions.

What a module reads of either model it declares in ``needs``, so that nothing else is computed, decoded or moved. Today
that is states of layers and raw outputs; a term over attentions adds its own field to `Needs` and `LayerStates`.

Shape suffixes: C positions of a chunk, P flat positions, D width of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
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
    """Base of all that an objective is the sum of: the losses here, and the terms that own parameters.

    ``weight`` is what `Objective` multiplies by; 0 measures the part without training on it. ``select`` restricts it to
    some positions (default: all).
    """

    needs: ClassVar[str]
    """What the part is made of, in words: of the teacher, or of the corpus where ``uses_teacher`` is False."""

    uses_teacher: ClassVar[bool] = True
    """Whether the part reads the teacher's targets; without distillation, a student is trained on parts that do not."""

    needs_facts: ClassVar[tuple[Fact, ...]] = ()
    """What the cache must know (`TeacherContext.has`)."""

    weight: Weight
    select: Select | None = None

    @property
    def sources(self) -> str:
        """What the part is made of, in words that say where the teacher has no share in it."""
        return self.needs if self.uses_teacher else f"{self.needs}; nothing of the teacher"

    @abstractmethod
    def refusal(self, context: TeacherContext) -> str | None:
        """Return why the part makes no sense with such a cache and what to do instead; None if it does."""

    def check(self, context: TeacherContext, name: str) -> None:
        """Raise ``ConfigError`` about the part called ``name`` when it makes no sense with such a cache."""
        reason = allowed(self, context)
        if reason is not None:
            raise ConfigError(f"{name}: {reason}")


class Loss(Part):
    """Base of all losses."""

    is_divergence: ClassVar[bool]
    """Whether the loss is 0 exactly when student and teacher agree on the K + 1 outcomes."""

    needs = "the probabilities of the kept ids and of their tail"
    needs_facts: ClassVar[tuple[Fact, ...]] = ("vocabulary_probabilities",)

    ignores_samples: ClassVar[bool] = False
    """Whether the loss reads no samples but only the exact kept ids before them (see ``TeacherContext.num_kept``)."""

    @abstractmethod
    def values(self, view: ChunkView) -> Tensor:
        """Return the loss of each of the C positions, [C], unweighted."""

    def selected_values(self, view: ChunkView) -> Tensor:
        """Return the loss of each of the C positions that are selected and 0 at the others, [C], unweighted."""
        values_C = self.values(view)
        return values_C if self.select is None else self.select.keep(values_C, view.teacher)

    def refusal(self, context: TeacherContext) -> str | None:
        """Return why the loss makes no sense with such a cache and what to do instead; None if it does.

        Unless a loss says otherwise it wants true probabilities: only what is linear in them may be fed estimates.
        """
        if not context.is_sampled or (self.ignores_samples and context.num_kept):
            return context.lacks(*self.needs_facts)
        kinds = "top-k, hybrid or hidden" if self.ignores_samples else "top-k or hidden"
        return f"it needs {self.needs}, and the cache holds {context.holds}; use a cache of {kinds} targets"


def allowed(part: Part, context: TeacherContext) -> str | None:
    """Return None where ``part`` makes sense with a cache of this ``context``, else the reason and what to do.

    What has schedules must make sense at all times of a run.
    """
    if context.kind == "outputs" and (isinstance(part, Loss) or part.select is not None):
        return f"it needs a distribution at every position, and the cache holds {context.holds}; use terms over outputs"
    for progress in part.moments():
        reason = part.at(progress).refusal(context)
        if reason is not None:
            return reason + (f" (reached by a schedule, at {progress:.0%} of the run)" if part.schedules else "")
    return None if part.select is None else part.select.refusal(context)


@dataclass(frozen=True)
class Needs:
    """Numbers of the layers whose states are read, of either model; 0 is the embeddings, n the state after block n."""

    student_layers: frozenset[int] = frozenset()
    teacher_layers: frozenset[int] = frozenset()
    outputs: bool = False
    """Whether the raw outputs of both models are read."""

    @property
    def teacher_fields(self) -> tuple[str, ...]:
        """Names of the cache's fields that hold the teacher's part."""
        layers = tuple(layer_field(layer) for layer in sorted(self.teacher_layers))
        return (*layers, OUTPUTS_FIELD) if self.outputs else layers

    @staticmethod
    def union(needs: Iterable[Needs]) -> Needs:
        """Return what all of them need together."""
        every = list(needs)
        return Needs(
            frozenset().union(*(item.student_layers for item in every)),
            frozenset().union(*(item.teacher_layers for item in every)),
            any(item.outputs for item in every),
        )


@dataclass(frozen=True)
class Outputs:
    """Raw outputs [P, C] of student and teacher, with the corpus's own numbers and the sequence of every row.

    ``labels_P`` float32, NaN where there is none; ``groups_P`` int64, rows of one sequence (a query's documents, the
    texts of a pair) have the same number and stand next to each other.
    """

    student_PC: Tensor
    teacher_PC: Tensor
    labels_P: Tensor
    groups_P: Tensor

    def with_student(self, student_PC: Tensor) -> Outputs:
        """Return the same rows with other outputs of the student, in whose dtype everything then is."""
        dtype = student_PC.dtype
        return replace(
            self, student_PC=student_PC, teacher_PC=self.teacher_PC.to(dtype), labels_P=self.labels_P.to(dtype)
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """Return every tensor changed alike."""
        return Outputs(*(change(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class LayerStates:
    """States [P, D] of some layers of student and teacher at the same P positions, by layer number; raw outputs."""

    student: Mapping[int, Tensor]
    teacher: Mapping[int, Tensor]
    outputs: Outputs | None = None

    @classmethod
    def from_batch(
        cls,
        student: Mapping[int, Tensor],
        batch: Mapping[str, Tensor],
        needs: Needs,
        student_outputs: Tensor | None = None,
    ) -> LayerStates:
        """Join the student's part with the teacher's of a collated batch; raises ``ConfigError`` for missing keys."""
        missing = [name for name in needs.teacher_fields if name not in batch]
        if missing:
            raise ConfigError(
                f"the objective needs {', '.join(missing)} in every training batch, found {', '.join(batch)}; read "
                "those fields of the cache too"
            )
        teacher = {layer: batch[layer_field(layer)] for layer in sorted(needs.teacher_layers)}
        if not needs.outputs:
            return cls(student, teacher)
        assert student_outputs is not None
        teacher_PC = batch[OUTPUTS_FIELD]
        unknown_P = torch.full_like(teacher_PC[:, 0], torch.nan)
        each_P = torch.arange(len(teacher_PC), device=teacher_PC.device)
        labels_P, groups_P = batch.get("label_values", unknown_P), batch.get("groups", each_P)
        return cls(student, teacher, Outputs(student_outputs, teacher_PC, labels_P, groups_P))

    def check(self, num_positions: int) -> None:
        """Raise ``StudentError`` unless every layer has one state for each of the teacher's rows."""
        for whose, states in (("student", self.student), ("teacher", self.teacher)):
            for layer, states_PD in states.items():
                if states_PD.shape[0] != num_positions:
                    raise StudentError(
                        f"layer {layer} of the {whose} has {states_PD.shape[0]} states for {num_positions} rows of the "
                        "teacher; select the real positions (the batch's 'rows') first"
                    )

    def select(self, rows_P: Tensor) -> LayerStates:
        """Return the states at the positions with the given int64 indices, in that order."""
        student, teacher = (
            {layer: states_PD.index_select(0, rows_P) for layer, states_PD in states.items()}
            for states in (self.student, self.teacher)
        )
        outputs = None if self.outputs is None else self.outputs.each(lambda tensor: tensor.index_select(0, rows_P))
        return LayerStates(student, teacher, outputs)


class TermModule(nn.Module, ABC):
    """A term made for one cache and one student, with its parameters (float32 whatever the student's dtype)."""

    needs: Needs

    @abstractmethod
    def forward(self, states: LayerStates) -> Tensor:
        """Return the term's value at each of the P positions, [P], unweighted, in float32 at least."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return what was decided when the term was made, in plain JSON types, for the record of the run."""


class Term(Part):
    """Base of the settings of all terms.

    At weight 0, where a term is measured and not trained on, its parameters have a gradient of 0. Only the optimiser's
    weight decay and momentum move them.
    """

    needs_pairs: ClassVar[bool] = False
    """Whether it says something of pairs of texts only."""

    @abstractmethod
    def build(self, context: TeacherContext, student_widths: Sequence[int], generator: torch.Generator) -> TermModule:
        """Return the module for such a cache and a student whose states 0, 1, ..., n have these widths.

        Parameters are drawn from ``generator`` alone. Raises ``ConfigError`` when the student does not fit.
        """


def build_terms(
    terms: Mapping[str, Term], context: TeacherContext, student_widths: Sequence[int], seed: int
) -> nn.ModuleDict:
    """Return the modules of ``terms`` by name; raises ``ConfigError`` naming the term that does not fit the student.

    Each samples from a generator of its own, seeded with ``seed``: the same on every rank, the same when a run is
    resumed, and neither dropout nor the data order of a run depends on whether there are terms.
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

    ``terms`` are the settings of the moment (`Term.at`), ``masks`` [P] bool the positions that each of them looks at.
    Every parameter takes part, with gradient 0 where there are no positions or the weight is 0: distributed data
    parallelism waits for all of them in every micro-batch.
    """
    total: Tensor | float = 0.0
    sums = {}
    for name, module in modules.items():
        weight, mask_P = terms[name].weight, masks[name]
        # Under autocast the maps would run in 8 bits of mantissa, although they cost next to nothing.
        autocast_off = torch.autocast(mask_P.device.type, enabled=False)
        with autocast_off, torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            # The others are left out, not multiplied by 0: what they hold may be no number.
            value = module(states if mask_P.all() else states.select(mask_P.nonzero().squeeze(1))).sum()
        sums[name] = value.detach()
        total = total + (weight * value if weight > 0 else untouched(module.parameters()))
    return total, sums


def untouched(tensors: Iterable[Tensor]) -> Tensor | float:
    """Return 0 with a gradient of 0 for each of the tensors that want one."""
    return sum((0.0 * tensor.sum() for tensor in tensors if tensor.requires_grad), start=0.0)
