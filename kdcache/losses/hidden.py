"""Terms over hidden states: match states of the student to those of the teacher, layer by layer.

Layers are paired. If student and teacher differ in width, a linear projection from the student's states to the
teacher's is trained with the student and discarded after training (FitNets; Romero et al., 2015, section 2.2). Every
pair has a projection of its own, without a bias, as in TinyBERT (Jiao et al., 2020, equation 8). It is initialised as
an orthogonal matrix, the identity if square: states keep their lengths and angles, so the first gradients of the
student do not depend on a random scaling.

Some positions, attention sinks such as the first token, have states a hundred times longer than the median. They would
dominate a plain MSE, so by default the error is relative to the size of the teacher's state (``normalise``).

The value of a position is the mean over the width and over the pairs.

Shape suffixes: P flat positions, D width (that of the teacher, after the projection).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.losses.base import LayerStates, Needs, Term, TermModule
from kdcache.losses.kernel import at_least_float32
from kdcache.losses.teacher import TeacherContext
from kdcache.targets_config import layer_number

Layer = int | Literal["last"]

#: Added to mean squares, as in RMSNorm, for states of zeros.
_EPS = 1e-6


class HiddenTerm(Term):
    """Base class of terms over hidden states.

    ``layers`` maps layers of the student to layers of the teacher: 0 is the embeddings, n the state after block n,
    ``last`` or -1 the state after the final norm. By default every stored layer is paired with the student's layer at
    the same relative depth, s = round(t x student's blocks / teacher's blocks); of several teacher layers at one layer
    of the student the deepest is used.

    ``projection``: ``linear`` trains a projection for every pair, ``none`` for none, ``auto`` where widths differ.
    """

    needs = "the teacher's hidden states of the mapped layers"

    layers: dict[Layer, Layer] | None = Field(default=None, min_length=1)
    projection: Literal["auto", "linear", "none"] = "auto"

    @abstractmethod
    def compare(self, student_PD: Tensor, teacher_PD: Tensor) -> Tensor:
        """Return the distance between the states at each position, [P], in their dtype."""

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why these settings cannot be used with such a cache, and what to do instead; None if they can."""
        stored = context.layer_widths
        if not stored:
            return (
                "it needs the teacher's hidden states, and the cache stores none; dump with --hidden-states, such as "
                "--hidden-states last,12"
            )
        wanted = [layer_number(layer, context.num_layers) for layer in (self.layers or {}).values()]
        missing = sorted({layer for layer in wanted if layer not in stored})
        if missing:
            return (
                f"it needs the teacher's hidden states of layer {', '.join(map(str, missing))}, and the cache stores "
                f"those of layer {', '.join(map(str, stored))} of 0 (embeddings) to {context.num_layers} (last); "
                "choose among these, or dump with --hidden-states"
            )
        return None

    def pairs(self, context: TeacherContext, num_student_layers: int) -> dict[int, int]:
        """Return the teacher's layer for each paired layer of the student; raises ``ConfigError``."""
        if self.layers is None:
            depth = num_student_layers / context.num_layers
            return {round(layer * depth): layer for layer in sorted(context.layer_widths)}
        pairs: dict[int, int] = {}
        for student_layer, teacher_layer in self.layers.items():
            number = layer_number(student_layer, num_student_layers)
            if not 0 <= number <= num_student_layers:
                raise ConfigError(
                    f"the student has no layer {student_layer}; it has 0 (embeddings) to {num_student_layers} (last)"
                )
            if number in pairs:
                raise ConfigError(
                    f"layers has layer {number} of the student twice; pair it with one layer of the teacher"
                )
            pairs[number] = layer_number(teacher_layer, context.num_layers)
        return pairs

    def build(self, context: TeacherContext, student_widths: Sequence[int], generator: torch.Generator) -> HiddenModule:
        """Return the module for such a cache and a student whose states 0, 1, ..., n have these widths."""
        pairs = self.pairs(context, len(student_widths) - 1)
        maps = {}
        for student_layer, teacher_layer in sorted(pairs.items()):
            width, teacher_width = student_widths[student_layer], context.layer_widths[teacher_layer]
            if self.projection == "none" and width != teacher_width:
                raise ConfigError(
                    f"projection none needs equal widths, but layer {student_layer} of the student is {width} wide "
                    f"and layer {teacher_layer} of the teacher {teacher_width}; use projection auto or linear"
                )
            if self.projection == "linear" or width != teacher_width:
                maps[student_layer] = _orthogonal(width, teacher_width, generator)
        return HiddenModule(self, pairs, maps)


class HiddenMSE(HiddenTerm):
    """Mean squared error of hidden states.

    ``normalise`` selects the divisor of both states at each position. ``teacher``: the root mean square of the
    teacher's state, so that the value is the squared relative error |s - t|^2 / |t|^2. ``none``: no division, the plain
    MSE of TinyBERT (Jiao et al., 2020, equation 8). (Dividing each by its own would give 2 x `HiddenCosine`.)
    """

    normalise: Literal["teacher", "none"] = "teacher"

    def compare(self, student_PD: Tensor, teacher_PD: Tensor) -> Tensor:
        """Return the mean squared error at each position, [P]."""
        squares_P = (student_PD - teacher_PD).square().mean(1)
        return squares_P if self.normalise == "none" else squares_P / (teacher_PD.square().mean(1) + _EPS)


class HiddenCosine(HiddenTerm):
    """1 - cosine of the angle between hidden states (DistilBERT; Sanh et al., 2019, section 2)."""

    def compare(self, student_PD: Tensor, teacher_PD: Tensor) -> Tensor:
        """Return 1 - cosine at each position, [P]."""
        return 1 - nn.functional.cosine_similarity(student_PD, teacher_PD, dim=1)


class HiddenModule(TermModule):
    """The mean over ``pairs`` {student layer: teacher layer} of the distance defined by ``term``.

    ``maps`` are the linear projections by student layer; a layer without one is compared directly.
    """

    def __init__(self, term: HiddenTerm, pairs: Mapping[int, int], maps: Mapping[int, nn.Linear]) -> None:
        super().__init__()
        self._term = term
        self.pairs = dict(sorted(pairs.items()))
        self.needs = Needs(frozenset(pairs), frozenset(pairs.values()))
        self.maps = nn.ModuleDict({str(layer): linear for layer, linear in maps.items()})

    def forward(self, states: LayerStates) -> Tensor:
        """Return the value at each position, [P]."""
        values = []
        for student_layer, teacher_layer in self.pairs.items():
            student_PD = self._mapped(at_least_float32(states.student[student_layer]), student_layer)
            values.append(self._term.compare(student_PD, states.teacher[teacher_layer].to(student_PD.dtype)))
        return torch.stack(values).mean(0)

    def describe(self) -> dict[str, object]:
        """Return the pairs, and the layers of the student that have a projection."""
        return {"layers": {str(s): t for s, t in self.pairs.items()}, "projections": [int(name) for name in self.maps]}

    def _mapped(self, student_PD: Tensor, layer: int) -> Tensor:
        if str(layer) not in self.maps:
            return student_PD
        mapped_PD: Tensor = self.maps[str(layer)](student_PD)
        return mapped_PD


def _orthogonal(width: int, teacher_width: int, generator: torch.Generator) -> nn.Linear:
    # Without the default initialisation, which would use the generator of dropout.
    linear = nn.utils.skip_init(nn.Linear, width, teacher_width, bias=False)
    if width == teacher_width:
        nn.init.eye_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight, generator=generator)
    return linear
