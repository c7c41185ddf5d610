"""Learn where it matters: a loss at some positions only, chosen by what the cache says about them.

A position is chosen by the teacher alone, so the choice is the same in every epoch and for every student. Bounds are
numbers (``min``, ``max``), or a share of the positions of the cache (``top``, ``bottom``), which is turned into a bound
*once*, before training: a share of each batch would make the gradient depend on how a step is split.

A position that is not chosen contributes 0, and the denominator stays the number of valid positions of the step. With
a share s chosen the gradient of the loss is therefore about s times as long; weight / s makes up for that. For Adam,
which divides by the size of gradients, it matters only against the other losses and ``max_grad_norm``.

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
    """Which positions a loss looks at: by which measure (see `MEASURES`), and within which bounds.

    ``min`` and ``max`` are included; nats, or a probability for ``confidence``. ``top`` and ``bottom`` are the share of
    positions with the highest or lowest values, between 0 and 1; of equal values at the bound all are chosen.
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
        """Whether a share is to be turned into a bound first."""
        return self.top is not None or self.bottom is not None

    def resolve(self, values_P: Tensor) -> Select:
        """Return the selection with its share turned into a bound on ``values_P``, of a sample of all positions.

        ``values_P`` is what `MEASURES` makes of them. Raises ``ConfigError`` when the sample is empty.
        """
        if not self.is_share:
            return self
        values_P = values_P[~values_P.isnan()]  # of rows without an answer of the corpus
        if not len(values_P):
            end = "highest" if self.top is not None else "lowest"
            raise ConfigError(f"no position counts, so there is no share of them with the {end} {self.by}")
        share = self.top or self.bottom
        assert share is not None
        count = max(round(share * len(values_P)), 1)
        ordered_P = values_P.sort(descending=self.top is not None).values
        # Without validation: rounding may have put a probability beyond 1.
        return self.model_copy(
            update={"top": None, "bottom": None, "min" if self.top is not None else "max": float(ordered_P[count - 1])}
        )

    def mask(self, teacher: TeacherRows) -> Tensor:
        """Return which of the teacher's rows are chosen, [P] bool.

        Raises ``ConfigError`` when a share has not been turned into a bound, or the rows lack what it goes by.
        """
        self.check_resolved()
        values_P = MEASURES[self.by](teacher)
        low = float("-inf") if self.min is None else self.min
        high = float("inf") if self.max is None else self.max
        return (values_P >= low) & (values_P <= high)

    def keep(self, values_P: Tensor, teacher: TeacherRows) -> Tensor:
        """Return ``values_P`` where the teacher's row is chosen and 0 elsewhere, [P]; raises what `mask` raises."""
        return torch.where(self.mask(teacher), values_P, 0.0)

    def check_resolved(self) -> None:
        """Raise ``ConfigError`` when a share has not been turned into a bound."""
        if self.is_share:
            raise ConfigError(
                "select: a share of the positions has to be turned into a bound on the values of a cache first; "
                "kdcache.losses.from_cache.resolve_selection does that"
            )

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why such a cache does not know the measure and what to do instead; None if it does."""
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
