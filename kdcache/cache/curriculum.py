"""Curricula: the order of a whole run by difficulty, computed from the per-sequence table alone.

The sequences are ranked by a column. A *pacing* maps the progress of the run to the share of the sequences, from the
easy end, that is available. Available sequences that were not used yet form a pool: a step takes its sequences from the
pool at random, and newly available sequences join it. When the pool is empty, a new *pass* begins over all sequences
that are available by then. So

- a sequence is not used again before all other available sequences have been used;
- a newly available sequence is used in the current pass, at a random time among those that still wait. If the run ends
  inside a pass, the rest of that pass is not used, as in a plain run that ends inside an epoch;
- a run of one epoch whose pacing stays ahead of the use (``linear`` and ``root`` do with ``full_at`` up to 0.5, the
  default) uses every sequence exactly once: the same data as a plain run, in another order. In several epochs the easy
  sequences come more often, and every sequence comes if ``full_at`` is at most ``1 - 1 / epochs``;
- the first step always finds enough sequences, however small ``start`` is.

The pacing ``sorted`` makes available exactly as many sequences as the steps so far need, so the first pass is in strict
order of difficulty. Later passes are shuffled.

The order is a pure function of (texts, seed, curriculum, column, number of steps, sequences per step). A curriculum
takes sequences from the whole cache, while the plain order stays inside a window of shards. So use it only with caches
that fit in memory or are on a fast disk.

Shape suffix: N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kdcache.cache.order import generator_of
from kdcache.config import Config
from kdcache.plugins import Table

if TYPE_CHECKING:
    from kdcache.cache.filters import Columns


class Curriculum(Config):
    """Which sequences are easy, and when harder ones become available.

    ``by`` is a numeric column of the per-sequence table, in which small values are easy (if large ones are, as in
    ``kept_mass``, set ``order`` to ``hard-to-easy``). ``pacing`` is a name in ``PACINGS``: ``linear``, ``root`` and
    ``step`` begin with the share ``start`` of the sequences and reach all of them at the share ``full_at`` of the
    steps; ``sorted`` is the strict order, to which neither setting applies.
    """

    by: str = "teacher_loss"
    order: Literal["easy-to-hard", "hard-to-easy"] = "easy-to-hard"
    pacing: str = "root"
    start: float = Field(default=0.2, gt=0, le=1)
    full_at: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _known_pacing(self) -> Curriculum:
        PACINGS.check(self.pacing)
        # Default values are accepted, because run records contain all settings and must be readable again.
        unused = [name for name in ("full_at", "start") if getattr(self, name) != type(self).model_fields[name].default]
        if self.pacing == "sorted" and unused:
            raise ValueError(f"pacing sorted has no {' and no '.join(unused)}; use linear, root or step")
        return self

    def share(self, progress: float, passes: float) -> float:
        """Return the share of the sequences, from the easy end, that is available (values above 1 mean all).

        ``progress`` is that of the run, 0 to 1. ``passes`` is the number of sequences used by all steps including the
        current one, divided by the number of all sequences.
        """
        return PACINGS[self.pacing](self.start, min(progress / self.full_at, 1.0), passes)

    def ranking(self, table: Columns, chosen_N: NDArray[np.int64], name: str) -> NDArray[np.int64]:
        """Return the sequences ``chosen_N`` with the easiest first; ``name`` decides the order of equal ones.

        Raises ``ConfigError`` when ``by`` is not a numeric column of the per-sequence ``table``, or lacks some values.
        """
        from kdcache.cache.filters import number_column  # imports pyarrow, which reading a configuration does not need

        mixed_N = generator_of(f"{name}/ties").permutation(chosen_N)
        values_N = number_column(table, self.by, mixed_N, "curriculum.by")
        values_N = values_N if self.order == "easy-to-hard" else -values_N
        ranked_N: NDArray[np.int64] = mixed_N[np.argsort(values_N, kind="stable")]
        return ranked_N


class PacedOrder:
    """The order of a run that follows a curriculum, cut into epochs.

    ``ranked_N`` are the sequences with the easiest first, ``num_steps`` the steps of the whole run. An epoch has as
    many sequences as in a plain run (its last step may be smaller too), but not each sequence exactly once.
    """

    def __init__(
        self, curriculum: Curriculum, ranked_N: NDArray[np.int64], *, num_steps: int, sequences_per_step: int, name: str
    ) -> None:
        self._curriculum = curriculum
        self._num_steps = num_steps
        self._sequences_per_step = sequences_per_step
        self._pool = _Pool(ranked_N, generator_of(f"{name}/curriculum"))
        self._epochs: list[NDArray[np.int64]] = []

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        return self._pool.num_sequences

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the sequences of epoch ``number`` in their order, [num_sequences] int64."""
        while len(self._epochs) <= number:
            self._epochs.append(self._next_epoch())
        return self._epochs[number]

    def _next_epoch(self) -> NDArray[np.int64]:
        starts = range(0, self.num_sequences, self._sequences_per_step)
        first_step, num_before = len(self._epochs) * len(starts), len(self._epochs) * self.num_sequences
        drawn = []
        for step, start in enumerate(starts, first_step):
            count = min(self._sequences_per_step, self.num_sequences - start)
            progress = min(step / max(self._num_steps - 1, 1), 1.0)
            share = self._curriculum.share(progress, (num_before + start + count) / self.num_sequences)
            # Rounded first: a share of exactly 12 sequences must not become 13.
            num_available = math.ceil(round(share * self.num_sequences, 6))
            self._pool.admit(max(num_available, self._sequences_per_step))
            drawn.append(self._pool.draw(count))
        return np.concatenate(drawn)


class _Pool:
    """The sequences that are available and not used in this pass: the first ``_num_left`` of ``_left_N``."""

    def __init__(self, ranked_N: NDArray[np.int64], generator: np.random.Generator) -> None:
        self.num_sequences = len(ranked_N)
        self._ranked_N = ranked_N
        self._generator = generator
        self._num_available = 0
        self._left_N = np.empty_like(ranked_N)
        self._num_left = 0

    def admit(self, num_available: int) -> None:
        """Make the first ``num_available`` sequences of the ranking available, in addition to earlier ones."""
        self._put(self._ranked_N[self._num_available : num_available])
        self._num_available = min(max(num_available, self._num_available), self.num_sequences)

    def draw(self, count: int) -> NDArray[np.int64]:
        """Return ``count`` different sequences (at most as many as are available), [count]."""
        last_N = self._take(min(count, self._num_left))
        if len(last_N) == count:
            return last_N
        # A new pass begins inside the step; sequences that the step has already join the pool after it.
        available_N = self._ranked_N[: self._num_available]
        self._put(available_N[~np.isin(available_N, last_N)])
        sampled_N = np.concatenate([last_N, self._take(count - len(last_N))])
        self._put(last_N)
        return sampled_N

    def _put(self, sequences_N: NDArray[np.int64]) -> None:
        self._left_N[self._num_left : self._num_left + len(sequences_N)] = sequences_N
        self._num_left += len(sequences_N)

    def _take(self, count: int) -> NDArray[np.int64]:
        places = self._generator.choice(self._num_left, count, replace=False)
        taken_N = self._left_N[places]
        # The holes are filled from the end, so the cost depends on ``count`` alone.
        self._num_left -= count
        is_kept = np.ones(count, dtype=bool)
        is_kept[places[places >= self._num_left] - self._num_left] = False
        self._left_N[places[places < self._num_left]] = self._left_N[self._num_left :][:count][is_kept]
        return taken_N


def _linear(start: float, elapsed: float, passes: float) -> float:
    return start + (1 - start) * elapsed


def _root(start: float, elapsed: float, passes: float) -> float:
    """Competence of Platanios et al. (2019), equation 8: new sequences come at a rate that falls as more are known."""
    return math.sqrt(start**2 + (1 - start**2) * elapsed)


def _step(start: float, elapsed: float, passes: float) -> float:
    return start if elapsed < 1 else 1.0


def _sorted(start: float, elapsed: float, passes: float) -> float:
    return passes


#: Name -> share that is available, of (start, share of the time until all are, passes drawn with this step).
PACINGS: Table[Callable[[float, float, float], float]] = Table(
    "pacing", "kdcache.curricula", {"linear": _linear, "root": _root, "step": _step, "sorted": _sorted}
)
