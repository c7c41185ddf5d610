"""What every loss is: its own configuration, and a formula that yields one value per position, in nats.

No loss masks, weights or averages: `Objective` does that, once. So a loss is a formula over a `ChunkView`. What a
formula may use depends on the cache, and a loss that asks for more than the cache holds is refused before training
(`allowed`, `Loss.check`) with what to do instead; nothing is approximated quietly.

Shape suffixes: C positions of a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from kdcache.config import Config
from kdcache.errors import ConfigError
from kdcache.losses.context import TeacherContext
from kdcache.losses.schedules import Weight
from kdcache.losses.view import ChunkView


class Loss(Config, ABC):
    """Base of all losses. ``weight`` is what `Objective` multiplies by; 0 measures the loss without training on it."""

    is_divergence: ClassVar[bool]
    """Whether the loss is 0 exactly when student and teacher agree on the K + 1 outcomes."""

    needs: ClassVar[str] = "the probabilities of the kept ids and of their tail"
    """What of the teacher the loss is made of, in words."""

    weight: Weight

    @abstractmethod
    def values(self, view: ChunkView) -> Tensor:
        """Return the loss of each of the C positions, [C], unweighted."""

    def refusal(self, context: TeacherContext) -> str | None:
        """Return why the loss makes no sense with such a cache and what to do instead; None if it does.

        Unless a loss says otherwise it wants true probabilities: only what is linear in them may be fed estimates.
        """
        if context.is_drawn:
            return f"it needs {self.needs}, and the cache holds {context.holds}; use a cache of top-k or hidden targets"
        return None

    def check(self, context: TeacherContext, name: str) -> None:
        """Raise ``ConfigError`` about the loss called ``name`` when it makes no sense with such a cache."""
        reason = allowed(self, context)
        if reason is not None:
            raise ConfigError(f"{name}: {reason}")


def allowed(loss: Loss, context: TeacherContext) -> str | None:
    """Return None where ``loss`` makes sense with a cache of this ``context``, else the reason and what to do."""
    return loss.refusal(context)
