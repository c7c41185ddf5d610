"""Schedules: weights and temperatures that change during a run.

A schedule is a pure function of the *progress* of a run, 0 at its first step and 1 at its last, so resuming a run needs
only the number of steps done. Between two knots it is monotone and stays between its values, so checking the values and
some sample points checks the whole run.

A field annotated `Weight` or `Temperature` takes a number or a schedule, ``0.9`` or ``{schedule: linear, start: 0.9,
end: 0.1}``. Type checkers see ``float``: formulas only see the numbers that `Scheduled.at` inserts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn, Self

from pydantic import (
    Field,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from kdcache.config import Config
from kdcache.errors import unknown


class Schedule(Config, ABC):
    """Base class of schedules; ``value_fields`` names the fields that hold values."""

    value_fields: ClassVar[tuple[str, ...]]

    schedule: str

    @abstractmethod
    def at(self, progress: float) -> float:
        """Return the value at ``progress``, from 0 (the first step of a run) to 1 (the last)."""

    def knots(self) -> tuple[float, ...]:
        """Return the progress of the knots, other than 0 and 1, between which the schedule is smooth."""
        return ()


class Constant(Schedule):
    """One value; validation replaces it by the number."""

    value_fields = ("value",)

    schedule: Literal["constant"] = "constant"
    value: float

    def at(self, progress: float) -> float:
        return self.value


class _Ramp(Schedule):
    """From ``start`` to ``end`` between the fractions ``begin`` and ``until`` of the run; constant before and after."""

    value_fields = ("start", "end")

    start: float
    end: float
    begin: float = Field(default=0.0, ge=0, le=1)
    until: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _takes_time(self) -> Self:
        if self.begin >= self.until:
            raise ValueError(f"begin must be less than until, found {self.begin:g} and {self.until:g}")
        return self

    def at(self, progress: float) -> float:
        share = (progress - self.begin) / (self.until - self.begin)
        return _between(self.start, self.end, self.interpolate(min(max(share, 0.0), 1.0)))

    @abstractmethod
    def interpolate(self, share: float) -> float:
        """Return the fraction of the way from ``start`` to ``end`` after the fraction ``share`` of the time."""

    def knots(self) -> tuple[float, ...]:
        return (self.begin, self.until)


class Linear(_Ramp):
    """A straight line."""

    schedule: Literal["linear"] = "linear"

    def interpolate(self, share: float) -> float:
        return share


class Cosine(_Ramp):
    """Half a cosine: slow, fast, slow."""

    schedule: Literal["cosine"] = "cosine"

    def interpolate(self, share: float) -> float:
        return (1 - math.cos(math.pi * share)) / 2


class WarmupStableDecay(Schedule):
    """Linearly from ``start`` to ``peak``, constant, linearly to ``end``.

    ``warmup`` and ``decay`` are the first and the last fraction of the run. Peng et al. (2024, "Pre-training
    Distillation for Large Language Models: A Design Space Exploration") use this schedule for the distillation weight.
    """

    value_fields = ("start", "peak", "end")

    schedule: Literal["wsd"] = "wsd"
    start: float
    peak: float
    end: float
    warmup: float = Field(default=0.1, ge=0, le=1)
    decay: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay must be at most 1, found {self.warmup:g} + {self.decay:g}")
        return self

    def at(self, progress: float) -> float:
        if progress < self.warmup:
            return _between(self.start, self.peak, progress / self.warmup)
        left = 1 - progress
        if left < self.decay:
            return _between(self.end, self.peak, left / self.decay)
        return self.peak

    def knots(self) -> tuple[float, ...]:
        return (self.warmup, 1 - self.decay)


class Scheduled(Config):
    """Base class of configurations with fields that may hold a schedule."""

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The fields that hold a schedule."""
        return {name: value for name, value in self if isinstance(value, Schedule)}

    def at(self, progress: float) -> Self:
        """Return the configuration with all schedules replaced by their values at ``progress``, from 0 to 1.

        Formulas and compatibility checks expect numbers. Without schedules this is the same object.
        """
        values = {name: schedule.at(progress) for name, schedule in self.schedules.items()}
        return self.model_copy(update=values) if values else self

    def sample_points(self) -> list[float]:
        """Return the progress of points that represent the whole run: ends, knots, and three between each two."""
        schedules = self.schedules.values()
        if not schedules:
            return [0.0]
        knots = sorted({0.0, 1.0, *(knot for schedule in schedules for knot in schedule.knots())})
        steps = [_between(a, b, i / 4) for a, b in pairwise(knots) for i in range(4)]
        return [*steps, 1.0]


def highest(value: float | Schedule) -> float:
    """Return the largest value of a field during a run."""
    return max(getattr(value, name) for name in value.value_fields) if isinstance(value, Schedule) else value


def _between(a: float, b: float, share: float) -> float:
    # Exactly a at 0 and exactly b at 1, which a + (b - a) share is not.
    return (1 - share) * a + share * b


def _number_or_schedule(value: Any, check_number: ValidatorFunctionWrapHandler) -> Any:
    schedule = _schedule_of(value) if isinstance(value, Mapping) else value
    if not isinstance(schedule, Schedule):
        return check_number(value)
    for name in schedule.value_fields:
        try:
            check_number(getattr(schedule, name))
        except ValidationError as error:
            raise _at(name, error) from None
    return schedule.value if isinstance(schedule, Constant) else schedule


def _schedule_of(data: Mapping[str, Any]) -> Schedule:
    """Build a schedule; problems are reported at its settings, with one message each."""
    if "schedule" not in data:
        _reject("schedule", dict(data), f"a schedule needs its name; known: {', '.join(SCHEDULES)}")
    name = str(data["schedule"])
    if name not in SCHEDULES:
        _reject("schedule", name, unknown("schedule", name, SCHEDULES))
    kind = SCHEDULES[name]
    for key, value in data.items():
        if key not in kind.model_fields:
            _reject(str(key), value, unknown(f"setting of {name}", str(key), kind.model_fields))
    return kind.model_validate(data)


def _reject(name: str, found: Any, message: str) -> NoReturn:
    error = PydanticCustomError("schedule", "{message}", {"message": message})
    raise ValidationError.from_exception_data("schedule", [InitErrorDetails(type=error, loc=(name,), input=found)])


def _at(name: str, error: ValidationError) -> ValidationError:
    """Return the problems of a number as problems of the setting ``name``."""
    details = [
        InitErrorDetails(type=problem["type"], loc=(name,), input=problem["input"], ctx=problem.get("ctx", {}))
        for problem in error.errors()
    ]
    return ValidationError.from_exception_data("schedule", details)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Schedule) else value


if TYPE_CHECKING:
    Weight = float
    Temperature = float
else:
    _OR_SCHEDULE = (WrapValidator(_number_or_schedule), PlainSerializer(_plain))
    Weight = Annotated[float, Field(ge=0, allow_inf_nan=False), *_OR_SCHEDULE]
    # A divergence shrinks as 1/T^2 and is multiplied by T^2: well beyond 1000 float32 has no digit left of it.
    Temperature = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False), *_OR_SCHEDULE]

SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "wsd": WarmupStableDecay,
}
