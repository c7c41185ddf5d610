"""The losses: each is its own configuration and yields one value per position, in nats.

No loss masks, weights or averages: `Objective` does that, once. So a loss is a formula over a `ChunkView`. What a
formula may use depends on the cache, and a loss that asks for more than the cache holds is refused before training
(`allowed`, `Loss.check`) with what to do instead; nothing is approximated quietly.

By default the teacher and the student are compared on K + 1 outcomes, the K kept ids and one bucket for everything
else: the exact divergence of the coarsened pair, a lower bound of the full one, and the full one when K = V. Module
`tails` has the other treatments of the tail, module `tempered` the temperatures other than 1.

A new loss is one class here and its row in `LOSSES`; the configuration, the trainer and the tests enumerate the table.

Shape suffixes: C positions of a chunk, K kept ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdcache.config import Config
from kdcache.errors import ConfigError
from kdcache.losses.context import TeacherContext
from kdcache.losses.tails import TAILS, drawn_kl
from kdcache.losses.tempered import decoupled_kl, full_kl, grid_kl
from kdcache.losses.view import ChunkView

Mode = Literal["decoupled", "grid", "full"]


class Loss(Config, ABC):
    """Base of all losses. ``weight`` is what `Objective` multiplies by; 0 measures the loss without training on it."""

    is_divergence: ClassVar[bool]
    """Whether the loss is 0 exactly when student and teacher agree on the K + 1 outcomes."""

    needs: ClassVar[str] = "the probabilities of the kept ids and of their tail"
    """What of the teacher the loss is made of, in words."""

    weight: float = Field(ge=0, allow_inf_nan=False)

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

    def check(self, context: TeacherContext) -> None:
        """Raise ``ConfigError`` when the loss makes no sense with such a cache; see `allowed`."""
        reason = allowed(self, context)
        if reason is not None:
            name = next((name for name, loss in LOSSES.items() if loss is type(self)), type(self).__name__)
            raise ConfigError(f"{name}: {reason}")


class ForwardKL(Loss):
    """KL(teacher || student) at a temperature.

    ``tail`` says what is done about ids that were not kept (see module ``tails``). ``mode`` says how a temperature
    other than 1 is made (see module ``tempered``): ``full`` compares the whole vocabulary, at temperature 1 too. By
    default it is ``full`` where the cache has the teacher's hidden states and LM head and no other tail is asked for,
    else ``decoupled``. With draws the value is an unbiased estimate.
    """

    is_divergence = True

    needs = "the probabilities of the kept ids and of their tail; or draws, at temperature 1"

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    tail: Literal["bucket", "prior", "uniform", "renormalise", "drop"] = "bucket"
    mode: Mode | None = None

    def values(self, view: ChunkView) -> Tensor:
        """Return the divergence of each position, [C]."""
        mode = self.resolved_mode(view.context)
        if mode == "full":
            return full_kl(view, self.temperature)
        if view.context.is_drawn:
            return drawn_kl(view)
        if self.temperature == 1.0:
            return TAILS[self.tail](view)
        return grid_kl(view, self.temperature) if mode == "grid" else decoupled_kl(view, self.temperature)

    def resolved_mode(self, context: TeacherContext) -> Mode:
        """Return the mode that is used with such a cache."""
        if self.mode is not None:
            return self.mode
        return "full" if context.head is not None and self.tail == "bucket" else "decoupled"

    def refusal(self, context: TeacherContext) -> str | None:
        """Return why these settings make no sense with such a cache and what to do instead; None if they do."""
        if self.resolved_mode(context) == "full":
            return self._refusal_of_full(context)
        if self.tail != "bucket" and (context.is_drawn or self.temperature != 1.0):
            return self._refusal_of_tail(context)
        if context.is_drawn and self.temperature != 1.0:
            return (
                f"the cache holds {context.holds}, which estimate the teacher at temperature 1 only, found temperature "
                f"{self.temperature:g}; use temperature 1, or a cache of top-k or hidden targets"
            )
        if self.tail == "prior" and context.prior_V is None:
            return "the cache holds no tail prior; dump it with targets.tail_prior=true, or use tail bucket or uniform"
        if self.mode == "grid" and self.temperature != 1.0 and context.grid_index(self.temperature) is None:
            return self._refusal_of_grid(context)
        return None

    def _refusal_of_full(self, context: TeacherContext) -> str | None:
        if context.head is None:
            return (
                "mode full needs the teacher's last hidden state and LM head, and the cache holds "
                f"{context.holds}; dump with --targets hidden, or use another mode"
            )
        if self.tail != "bucket":
            return f"mode full knows the whole tail, so tail {self.tail} would change nothing; leave one of them out"
        return None

    def _refusal_of_tail(self, context: TeacherContext) -> str:
        if context.is_drawn:
            return (
                f"tail {self.tail} needs the exact mass of a tail, and in the cache draws stand for it: it holds "
                f"{context.holds}; use tail bucket"
            )
        return (
            f"tail {self.tail} exists at temperature 1 only, found temperature {self.temperature:g}; use tail bucket "
            "with it, or temperature 1"
        )

    def _refusal_of_grid(self, context: TeacherContext) -> str:
        stored = ", ".join(f"{temperature:g}" for temperature in context.temperatures)
        found = f"stores the tail at the temperatures {stored}" if stored else "stores the tail at temperature 1 only"
        return (
            f"mode grid needs the mass of the tail at temperature {self.temperature:g}, and the cache {found}; use "
            f"temperature 1{', one of these' if stored else ''}, or mode decoupled"
        )


class CrossEntropy(Loss):
    """Negative log-likelihood of the corpus's own next token."""

    is_divergence = False

    needs = "nothing: the corpus's own next token"

    def values(self, view: ChunkView) -> Tensor:
        """Return the loss of each position, [C]."""
        return -view.gold_logprob_C

    def refusal(self, context: TeacherContext) -> None:
        """Return None: the teacher plays no part."""


def allowed(loss: Loss, context: TeacherContext) -> str | None:
    """Return None where ``loss`` makes sense with a cache of this ``context``, else the reason and what to do."""
    return loss.refusal(context)


LOSSES: dict[str, type[Loss]] = {
    "forward_kl": ForwardKL,
    "cross_entropy": CrossEntropy,
}
