"""Selections: restrict a loss to some positions, by a measure of the teacher's targets.

The selection depends on the cache alone, so it is the same in every epoch and for every student. Bounds are numbers
(``min``, ``max``), or a share of the positions of the cache (``top``, ``bottom``), which is converted to a bound
*once*, before training: a share of each batch would make the gradient depend on how a step is split.

A position that is not selected contributes 0, and the denominator stays the number of valid positions of the step. If
the share s is selected, the gradient of the loss is about s times as large; the weight / s compensates for that. Adam
divides by the size of gradients, so it matters only relative to other losses and for ``max_grad_norm``.

Shape suffixes: P flat positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from kdcache.config import Config
from kdcache.errors import ConfigError, unknown
from kdcache.losses.teacher import Fact, TeacherContext, TeacherRows


class Select(Config):
    """The positions of a loss: a measure (see `MEASURES`) and its bounds.

    ``min`` and ``max`` are inclusive, in nats, or a probability for ``confidence``. ``top`` and ``bottom`` are the
    share of positions with the highest or lowest values, between 0 and 1; all values equal to the bound are selected.
    """

    by: str
    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)
    top: float | None = Field(default=None, gt=0, lt=1)
    bottom: float | None = Field(default=None, gt=0, lt=1)

    @field_validator("by")
    @classmethod
    def _known(cls, by: str) -> str:
        if by not in MEASURES:
            raise ValueError(unknown("measure", by, MEASURES))
        return by

    @model_validator(mode="after")
    def _one_range(self) -> Self:
        given = [name for name in ("top", "bottom") if getattr(self, name) is not None]
        bounds = [value for value in (self.min, self.max) if value is not None]
        if len(given) + bool(bounds) != 1:
            raise ValueError("select takes one of: min and max (or one of the two), top, bottom")
        if len(bounds) == 2 and bounds[0] > bounds[1]:
            raise ValueError(f"min must be at most max, found {self.min:g} and {self.max:g}")
        impossible = [value for value in bounds if not 0 <= value <= 1]
        if self.by == "confidence" and impossible:
            raise ValueError(f"confidence is a probability between 0 and 1, found {impossible[0]:g}")
        return self

    @property
    def is_share(self) -> bool:
        """Whether the bounds are a share, which `resolve` converts to a bound."""
        return self.top is not None or self.bottom is not None

    def resolve(self, values_P: Tensor) -> Select:
        """Return the selection with its share converted to a bound, from the measure ``values_P`` of a sample.

        Raises ``ConfigError`` if the sample is empty.
        """
        if not self.is_share:
            return self
        values_P = values_P[~values_P.isnan()]  # positions without a label
        if not len(values_P):
            end = "highest" if self.top is not None else "lowest"
            raise ConfigError(
                f"select: no position has a {self.by}, so the share with the {end} values is empty; select by another "
                "measure"
            )
        share = self.top or self.bottom
        assert share is not None
        count = max(round(share * len(values_P)), 1)
        ordered_P = values_P.sort(descending=self.top is not None).values
        # Without validation: rounding may have put a probability beyond 1.
        return self.model_copy(
            update={"top": None, "bottom": None, "min" if self.top is not None else "max": float(ordered_P[count - 1])}
        )

    def mask(self, teacher: TeacherRows) -> Tensor:
        """Return which positions are selected, [P] bool.

        Raises ``ConfigError`` if a share has not been converted to a bound, or the rows do not have the measure.
        """
        self.check_resolved()
        values_P = MEASURES[self.by](teacher)
        low = float("-inf") if self.min is None else self.min
        high = float("inf") if self.max is None else self.max
        return (values_P >= low) & (values_P <= high)

    def keep(self, values_P: Tensor, teacher: TeacherRows) -> Tensor:
        """Return ``values_P`` where the position is selected and 0 elsewhere, [P]; raises what `mask` raises."""
        return torch.where(self.mask(teacher), values_P, 0.0)

    def check_resolved(self) -> None:
        """Raise ``ConfigError`` if a share has not been converted to a bound."""
        if self.is_share:
            raise ConfigError(
                "select: a share of the positions must be converted to a bound on the values of a cache first; call "
                "kdcache.losses.from_cache.resolve_selection"
            )

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why such a cache does not have the measure, and what to do instead; None if it does."""
        if self.by == "confidence" and context.kind == "sampled":
            return (
                f"select by confidence needs the teacher's top-1 token, and the cache holds {context.holds}; "
                "select by teacher_entropy, or use a cache of another kind"
            )
        missing = context.lacks(*_NEEDED.get(self.by, ()))
        return None if missing is None else f"select by {self.by}: {missing}"


def _teacher_entropy(teacher: TeacherRows) -> Tensor:
    return teacher.require("entropy_P").double()


def _teacher_loss(teacher: TeacherRows) -> Tensor:
    return -teacher.require("gold_logprob_P").double()


def _confidence(teacher: TeacherRows) -> Tensor:
    # The first id is the top-1 of all rows that keep ids; a sampled one may only seem more probable.
    return teacher.logprobs_PK[:, 0].double().exp()


MEASURES: dict[str, Callable[[TeacherRows], Tensor]] = {
    "teacher_entropy": _teacher_entropy,
    "teacher_loss": _teacher_loss,
    "confidence": _confidence,
}
"""Measures of every position, [P] float64 so that bounds mean the same for students of all dtypes."""

_NEEDED: dict[str, tuple[Fact, ...]] = {
    "teacher_entropy": ("entropy",),
    "teacher_loss": ("gold_logprob",),
    "confidence": ("vocabulary_probabilities",),
}
