"""Targets of a transcoding that keeps fewer ids, and the tail prior that belongs to them.

`kdcache.cache.truncate` cuts the ids; the tail prior grows by the probabilities that it drops.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.tail_prior import TailSum
from kdcache.cache.truncate import cut_targets
from kdcache.errors import CorruptCacheError
from kdcache.schema import SequenceBatch, Targets, TargetsRecord


class TargetsCutter:
    """Makes targets of ``wanted`` from those of ``held``, and sums up the tail prior of the result.

    ``prior_V`` is the source's; it stands for its sum over any of its sequences, which is exact for all of them
    together and an estimate for some.
    """

    def __init__(
        self, held: TargetsRecord, wanted: TargetsRecord, vocab_size: int, prior_V: NDArray[np.float32] | None = None
    ) -> None:
        self._held, self._wanted, self._vocab_size = held, wanted, vocab_size
        self._prior_V = prior_V.astype(np.float64) if prior_V is not None and wanted.tail_prior else None
        self._forget()

    def __call__(self, batch: SequenceBatch) -> Targets:
        """Return the targets of a batch of the source; raises ``CorruptCacheError`` for ids outside the vocabulary."""
        largest = int(batch.targets.ids_PK.max(initial=0))
        if largest >= self._vocab_size:
            raise CorruptCacheError(
                f"sequences {batch.indices[0]} to {batch.indices[-1]} keep the id {largest}, the vocabulary has "
                f"{self._vocab_size}; kdcache verify --deep says more"
            )
        cut, dropped_PK = cut_targets(batch.targets, self._held, self._wanted)
        if self._prior_V is not None:
            ids, logprobs = batch.targets.ids_PK[dropped_PK], batch.targets.logprobs_PK[dropped_PK]
            self._dropped_V += np.bincount(ids, np.exp(logprobs.astype(np.float64)), self._vocab_size)
            self._num_positions += batch.targets.num_positions
        return cut

    def take_tail_sum(self) -> TailSum | None:
        """Return what all rows since the last call add to the tail prior; None where the targets have none."""
        if self._prior_V is None:
            return None
        taken = TailSum(self._prior_V * self._num_positions + self._dropped_V, self._num_positions)
        self._forget()
        return taken

    def _forget(self) -> None:
        self._num_positions = 0
        self._dropped_V = np.zeros(self._vocab_size)
