"""The order of a whole run by difficulty, from the per-sequence table alone: neither teacher nor torch is needed.

The sequences are ranked by a column. A *pacing* says which share of them, from the easy end, a step may draw from; it
is a function of the progress of the run. What is available and not yet drawn is a pool: a step samples its sequences from
it at random, and sequences that become available join it. Only when it is empty, a new *pass* begins over all that is
available by then. So

- a sequence is not drawn again before everything that was available has been drawn;
- a sequence that becomes available is drawn in the pass that is under way, among those that still wait, and neither
  before all others nor behind them. If the run ends inside a pass, the rest of that pass is not drawn, as in a plain
  run that ends inside an epoch;
- a run of one epoch whose pacing keeps ahead of what is drawn (``linear`` and ``root`` do with ``full_at`` up to 0.5,
  the default) samples every sequence exactly once: the same data as a plain run, in another order. In several epochs
  the easy ones come more often, and every one comes if ``full_at`` is at most ``1 - 1 / epochs``;
- the first step finds a full step's worth of sequences, however small ``start`` is.

The pacing ``sorted`` makes available just what the steps so far could have drawn, so that the first pass is the strict
order: each step is the next ones by difficulty. Later passes are shuffled.

The order is a pure function of (texts, seed, curriculum, column, number of steps, sequences per step). A curriculum
reaches all over the cache, unlike the plain order, which stays inside a window of shards; so it is not for caches that
neither fit into memory nor lie on a fast disk.

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
    """Which sequences are easy, and when the others come.

    ``by`` is a column of numbers of the per-sequence table, in which small means easy (where it does not, as with
    ``kept_mass``, turn ``order`` round). ``pacing`` is a row of ``PACINGS``: ``linear``, ``root`` and ``step`` begin
    with the share ``start`` of the sequences and have all of them from the share ``full_at`` of the steps on;
    ``sorted`` is the strict order and has neither.
    """

    by: str = "teacher_loss"
    order: Literal["easy-to-hard", "hard-to-easy"] = "easy-to-hard"
    pacing: str = "root"
    start: float = Field(default=0.2, gt=0, le=1)
    full_at: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _known_pacing(self) -> Curriculum:
        PACINGS.check(self.pacing)
        # Defaults may stand there: a record of a run writes all settings out, and has to be one that can be read.
        unused = [name for name in ("full_at", "start") if getattr(self, name) != type(self).model_fields[name].default]
        if self.pacing == "sorted" and unused:
            raise ValueError(f"pacing sorted has no {' and no '.join(unused)}; take linear, root or step")
        return self

    def share(self, progress: float, passes: float) -> float:
        """Return the share of the sequences, from the easy end, that is available (more than 1 is all of them).

        ``progress`` is that of the run, 0 to 1; ``passes`` what the steps so far and this one draw, in passes over
        all sequences.
        """
        return PACINGS[self.pacing](self.start, min(progress / self.full_at, 1.0), passes)

    def ranking(self, table: Columns, chosen_N: NDArray[np.int64], name: str) -> NDArray[np.int64]:
        """Return the sequences ``chosen_N`` with the easiest first; ``name`` decides the order of equal ones.

        Raises ``ConfigError`` when ``by`` is no column of numbers of the per-sequence ``table``, or has no value for
        some of them.
        """
        from kdcache.cache.filters import number_column  # imports pyarrow, which reading a configuration does not need

        mixed_N = generator_of(f"{name}/ties").permutation(chosen_N)
        values_N = number_column(table, self.by, mixed_N, "curriculum.by")
        values_N = values_N if self.order == "easy-to-hard" else -values_N
        ranked_N: NDArray[np.int64] = mixed_N[np.argsort(values_N, kind="stable")]
        return ranked_N


class PacedOrder:
    """The sequences of every step of a run that follows a curriculum, cut into epochs.

    ``ranked_N`` are the sequences with the easiest first, ``num_steps`` the steps of the whole run. An epoch has as
    many sequences as in a plain run, and its last step may be smaller too; it is not each sequence once.
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
    """The sequences that are available and not yet drawn in this pass: the first ``_num_left`` of ``_left_N``."""

    def __init__(self, ranked_N: NDArray[np.int64], generator: np.random.Generator) -> None:
        self.num_sequences = len(ranked_N)
        self._ranked_N = ranked_N
        self._generator = generator
        self._num_available = 0
        self._left_N = np.empty_like(ranked_N)
        self._num_left = 0

    def admit(self, num_available: int) -> None:
        """Make the first ``num_available`` sequences of the ranking available; none becomes unavailable again."""
        self._put(self._ranked_N[self._num_available : num_available])
        self._num_available = min(max(num_available, self._num_available), self.num_sequences)

    def draw(self, count: int) -> NDArray[np.int64]:
        """Return ``count`` different sequences (at most as many as are available), [count]."""
        last_N = self._take(min(count, self._num_left))
        if len(last_N) == count:
            return last_N
        # A new pass begins inside the step; those that the step has already wait until it is over.
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
        # The holes are filled from the end, so that a draw costs no more than what it samples.
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
