"""What every loss is: its own configuration, and a formula that yields one value per position, in nats.

No loss weights or averages: `Objective` does that, once. So a loss is a formula over a `ChunkView`. What a formula may
use depends on the cache, and a loss that asks for more than the cache holds is refused before training (`allowed`,
`Loss.check`) with what to do instead; nothing is approximated quietly.

The weight and other numbers of a loss may be schedules, and a selection may restrict it to some positions. Neither is
a formula's business: `values` and `refusal` are only called on what `Loss.at` returns, in which all are numbers, and
`selected_values` puts 0 at the other positions.

Shape suffixes: C positions of a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses.context import TeacherContext
from kdcache.losses.schedules import Scheduled, Weight
from kdcache.losses.selection import Select
from kdcache.losses.view import ChunkView


class Part(Scheduled, ABC):
    """Base of all that an objective is the sum of: the losses here, and the terms that own parameters.

    ``weight`` is what `Objective` multiplies by; 0 measures the part without training on it. ``select`` restricts it to
    some positions (default: all).
    """

    needs: ClassVar[str]
    """What of the teacher the part is made of, in words."""

    uses_teacher: ClassVar[bool] = True
    """Whether the teacher plays a part; students without distillation are trained on parts where it does not."""

    weight: Weight
    select: Select | None = None

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
            return None
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
