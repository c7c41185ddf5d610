"""Forward KL, KL(teacher || student): the loss that every kind of cache has an estimate or an exact value of.

By default the teacher and the student are compared on K + 1 outcomes, the K kept ids and one bucket for everything
else: the exact divergence of the coarsened pair, a lower bound of the full one, and the full one when K = V. Module
`tails` has the other treatments of the tail, module `tempered` the temperatures other than 1.

Shape suffixes: C positions of a chunk, K kept ids.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kdcache.losses.base import Loss
from kdcache.losses.context import TeacherContext
from kdcache.losses.schedules import Temperature
from kdcache.losses.tails import TAILS, drawn_kl
from kdcache.losses.tempered import decoupled_kl, full_kl, grid_kl
from kdcache.losses.view import ChunkView

Mode = Literal["decoupled", "grid", "full"]


class ForwardKL(Loss):
    """KL(teacher || student) at a temperature.

    ``tail`` says what is done about ids that were not kept (see module ``tails``). ``mode`` says how a temperature
    other than 1 is made (see module ``tempered``): ``full`` compares the whole vocabulary, at temperature 1 too. By
    default it is ``full`` where the cache has the teacher's hidden states and LM head and no other tail is asked for,
    else ``decoupled``. With draws the value is an unbiased estimate.
    """

    is_divergence = True

    needs = "the probabilities of the kept ids and of their tail; or draws, at temperature 1"

    temperature: Temperature = 1.0
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
