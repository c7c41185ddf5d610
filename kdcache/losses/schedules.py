"""Weights and temperatures that change during a run.

A schedule is a pure function of the *progress* of a run, 0 at its first step and 1 at its last, so a run that is
resumed needs nothing but the number of steps done. It goes monotonically from one of its values to the next and never
leaves their range; so whoever checks the values and the moments between which they are reached has checked the run.

A field annotated `Weight` or `Temperature` takes a number or a schedule, ``0.9`` or ``{schedule: linear, start: 0.9,
end: 0.1}``. Type checkers see ``float`` there: formulas only ever meet the numbers that `Scheduled.at` puts in place.
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
from kdcache.errors import did_you_mean


class Schedule(Config, ABC):
    """Base of all schedules; ``levels`` names the fields that hold values."""

    levels: ClassVar[tuple[str, ...]]

    schedule: str

    @abstractmethod
    def at(self, progress: float) -> float:
        """Return the value at ``progress``, from 0 (the first step of a run) to 1 (the last)."""

    def corners(self) -> tuple[float, ...]:
        """Return the progress at which the course bends, beside 0 and 1."""
        return ()


class Constant(Schedule):
    """One value; a number in its place says the same, and is what becomes of it."""

    levels = ("value",)

    schedule: Literal["constant"] = "constant"
    value: float

    def at(self, progress: float) -> float:
        return self.value


class _Ramp(Schedule):
    """From ``start`` to ``end`` between the fractions ``begin`` and ``until`` of the run; constant before and after."""

    levels = ("start", "end")

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
        return _between(self.start, self.end, self.course(min(max(share, 0.0), 1.0)))

    @abstractmethod
    def course(self, share: float) -> float:
        """Return which part of the way is done after ``share`` of the time."""

    def corners(self) -> tuple[float, ...]:
        return (self.begin, self.until)


class Linear(_Ramp):
    """A straight line."""

    schedule: Literal["linear"] = "linear"

    def course(self, share: float) -> float:
        return share


class Cosine(_Ramp):
    """Half a cosine: slow, fast, slow."""

    schedule: Literal["cosine"] = "cosine"

    def course(self, share: float) -> float:
        return (1 - math.cos(math.pi * share)) / 2


class WarmupStableDecay(Schedule):
    """Linearly from ``start`` to ``peak``, constant, linearly to ``end``.

    ``warmup`` and ``decay`` are the first and the last fraction of the run. Peng et al. (2024, "Pre-training
    Distillation for Large Language Models: A Design Space Exploration") give the weight of distillation this course.
    """

    levels = ("start", "peak", "end")

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

    def corners(self) -> tuple[float, ...]:
        return (self.warmup, 1 - self.decay)


class Scheduled(Config):
    """Base of configurations with fields that may hold a schedule."""

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The fields that change during a run."""
        return {name: value for name, value in self if isinstance(value, Schedule)}

    def at(self, progress: float) -> Self:
        """Return the configuration with the numbers of that moment: ``progress`` is 0 at the first step, 1 at the last.

        Numbers are what all formulas and refusals expect; without schedules it is the same object.
        """
        values = {name: schedule.at(progress) for name, schedule in self.schedules.items()}
        return self.model_copy(update=values) if values else self

    def moments(self) -> list[float]:
        """Return the progress of the moments that stand for the whole run: ends, bends, and three between each two."""
        schedules = self.schedules.values()
        if not schedules:
            return [0.0]
        corners = sorted({0.0, 1.0, *(corner for schedule in schedules for corner in schedule.corners())})
        steps = [_between(a, b, i / 4) for a, b in pairwise(corners) for i in range(4)]
        return [*steps, 1.0]


def highest(value: float | Schedule) -> float:
    """Return the largest value that a field has at any time."""
    return max(getattr(value, name) for name in value.levels) if isinstance(value, Schedule) else value


def _between(a: float, b: float, share: float) -> float:
    # Exactly a at 0 and exactly b at 1, which a + (b - a) share is not.
    return (1 - share) * a + share * b


def _number_or_schedule(value: Any, check_number: ValidatorFunctionWrapHandler) -> Any:
    schedule = _schedule_of(value) if isinstance(value, Mapping) else value
    if not isinstance(schedule, Schedule):
        return check_number(value)
    for name in schedule.levels:
        try:
            check_number(getattr(schedule, name))
        except ValidationError as error:
            raise _at(name, error) from None
    return schedule.value if isinstance(schedule, Constant) else schedule


def _schedule_of(data: Mapping[str, Any]) -> Schedule:
    """Build a schedule; problems are located at its settings, with one message each."""
    if "schedule" not in data:
        _refuse("schedule", dict(data), f"a schedule says which one it is; known are {', '.join(SCHEDULES)}")
    name = str(data["schedule"])
    if name not in SCHEDULES:
        _refuse("schedule", name, f"there is no such schedule, {did_you_mean(name, SCHEDULES)}")
    kind = SCHEDULES[name]
    for key, value in data.items():
        if key not in kind.model_fields:
            _refuse(str(key), value, f"{name} has no such setting, {did_you_mean(str(key), kind.model_fields)}")
    return kind.model_validate(data)


def _refuse(name: str, found: Any, message: str) -> NoReturn:
    error = PydanticCustomError("schedule", "{message}", {"message": message})
    raise ValidationError.from_exception_data("schedule", [InitErrorDetails(type=error, loc=(name,), input=found)])


def _at(name: str, error: ValidationError) -> ValidationError:
    """Return the problems of a number as problems of the setting that holds it."""
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
