"""Losses with a temperature: what such a setting means, and which caches allow it.

A row of kept ids knows the mass of its tail at temperature 1 and at the temperatures that the dump stored, and nothing
in between. So there are three ways to another temperature (see module ``tempered``), a loss says in ``modes`` which of
them it has, and one that the cache cannot serve is refused before training.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from kdcache.losses.base import Loss
from kdcache.losses.context import TeacherContext
from kdcache.losses.schedules import Temperature

Mode = Literal["decoupled", "grid", "full"]


class TemperedLoss(Loss):
    """Base of losses between two distributions that may be softened by a temperature.

    ``mode`` says how a temperature other than 1 is made: ``full`` compares the whole vocabulary, at temperature 1 too.
    By default it is ``full`` where the cache has the teacher's hidden states and LM head, else the first of ``modes``.
    """

    modes: ClassVar[tuple[Mode, ...]] = ("grid", "full")
    """The modes that the loss has at temperatures other than 1, the default first."""

    temperature: Temperature = 1.0
    mode: Mode | None = None

    def resolved_mode(self, context: TeacherContext) -> Mode:
        """Return the mode that is used with such a cache."""
        if self.mode is not None:
            return self.mode
        return "full" if context.head is not None else self.modes[0]

    def refusal(self, context: TeacherContext) -> str | None:
        """Return why these settings make no sense with such a cache and what to do instead; None if they do."""
        return super().refusal(context) or self.refusal_of_mode(context)

    def refusal_of_mode(self, context: TeacherContext) -> str | None:
        """Return why mode and temperature make no sense with such a cache and what to do instead; None if they do."""
        mode = self.resolved_mode(context)
        if mode == "full":
            return self._refusal_of_full(context)
        if self.temperature == 1.0:
            return None
        if mode not in self.modes:
            return (
                f"mode {mode} needs a chain rule, which this divergence has not; use temperature 1 (found "
                f"{self.temperature:g}), mode grid with a cache that stores the tail at this temperature, or a cache "
                "of hidden targets"
            )
        if mode == "grid" and context.grid_index(self.temperature) is None:
            return self._refusal_of_grid(context)
        return None

    def _refusal_of_full(self, context: TeacherContext) -> str | None:
        if context.head is not None:
            return None
        return (
            "mode full needs the teacher's last hidden state and LM head, and the cache holds "
            f"{context.holds}; dump with --targets hidden, or use another mode"
        )

    def _refusal_of_grid(self, context: TeacherContext) -> str:
        stored = ", ".join(f"{temperature:g}" for temperature in context.temperatures)
        found = f"stores the tail at the temperatures {stored}" if stored else "stores the tail at temperature 1 only"
        other = "mode decoupled" if "decoupled" in self.modes else "a cache of hidden targets"
        # Samples take the place of the tail, so no dump of them stores its mass.
        more = "" if context.is_sampled else "; a dump stores the tail at others with --temperatures"
        return (
            f"mode grid needs the mass of the tail at temperature {self.temperature:g}, and the cache {found}; use "
            f"temperature 1{', one of these' if stored else ''}, or {other}{more}"
        )
