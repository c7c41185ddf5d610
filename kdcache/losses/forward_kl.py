"""Forward KL, KL(teacher || student): the loss that every kind of cache has an estimate or an exact value of.

By default the teacher and the student are compared on K + 1 outcomes, the K kept ids and one bucket for everything
else: the exact divergence of the coarsened pair, a lower bound of the full one, and the full one when K = V. Module
`tails` has the other treatments of the tail, module `tempered` the temperatures other than 1.

Shape suffixes: C positions of a chunk, K kept ids.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kdcache.losses.context import TeacherContext
from kdcache.losses.modes import Mode, TemperedLoss
from kdcache.losses.tails import TAILS, sampled_kl
from kdcache.losses.tempered import decoupled_kl, full_kl, grid_kl
from kdcache.losses.view import ChunkView


class ForwardKL(TemperedLoss):
    """KL(teacher || student) at a temperature.

    ``tail`` says what is done about ids that were not kept (see module ``tails``). ``mode`` says how a temperature
    other than 1 is made (see module ``tempered``): ``full`` compares the whole vocabulary, at temperature 1 too. By
    default it is ``full`` where the cache has the teacher's hidden states and LM head, else ``decoupled``. With samples
    the value is an unbiased estimate.
    """

    is_divergence = True

    needs = "the probabilities of the kept ids and of their tail; or samples, at temperature 1"

    modes: ClassVar[tuple[Mode, ...]] = ("decoupled", "grid", "full")

    tail: Literal["bucket", "prior", "uniform", "renormalise", "drop"] = "bucket"

    def values(self, view: ChunkView) -> Tensor:
        """Return the divergence of each position, [C]."""
        mode = self.resolved_mode(view.context)
        if mode == "full":
            return full_kl(view, self.temperature)
        if view.context.is_sampled:
            return sampled_kl(view)
        if self.temperature == 1.0:
            return TAILS[self.tail](view)
        return grid_kl(view, self.temperature) if mode == "grid" else decoupled_kl(view, self.temperature)

    def refusal(self, context: TeacherContext) -> str | None:
        if context.head is not None and self.tail != "bucket":
            return (
                f"the cache holds {context.holds}, from which the whole tail is known, so tail {self.tail} makes no "
                "sense; leave it out, or transcode the cache to top-k targets"
            )
        if self.resolved_mode(context) == "full":
            return self.refusal_of_mode(context)
        if self.tail != "bucket" and (context.is_sampled or self.temperature != 1.0):
            return self._refusal_of_tail(context)
        if context.is_sampled and self.temperature != 1.0:
            return (
                f"the cache holds {context.holds}, which estimate the teacher at temperature 1 only, found temperature "
                f"{self.temperature:g}; use temperature 1, or a cache of top-k or hidden targets"
            )
        if self.tail == "prior" and context.prior_V is None:
            return "the cache holds no tail prior; dump it with targets.tail_prior=true, or use tail bucket or uniform"
        return self.refusal_of_mode(context)

    def _refusal_of_tail(self, context: TeacherContext) -> str:
        if context.is_sampled:
            return (
                f"tail {self.tail} needs the exact mass of a tail, and in the cache samples stand for it: it holds "
                f"{context.holds}; use tail bucket"
            )
        return (
            f"tail {self.tail} exists at temperature 1 only, found temperature {self.temperature:g}; use tail bucket "
            "with it, or temperature 1"
        )
