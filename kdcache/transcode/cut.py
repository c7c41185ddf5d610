"""Fewer kept ids from more: what is dropped goes to the tail, so that nothing of the teacher's mass is lost.

A smaller K or a threshold only moves the border between kept ids and tail. The dropped ids' log-probabilities are
known, so the new tail is their mass and the old tail added, never 1 minus the head (which rounding makes negative).
The same holds at the other temperatures, where the kept ids' distribution is that of their log-probabilities over T,
scaled to the mass outside the stored tail; and for the tail prior, to which the dropped probabilities are added. Gold
token and entropy are of the full distribution and stay.

Everything is exact up to how the source rounded its numbers. Shape suffixes: P positions, K ids of the source, G
temperatures, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.tail_prior import TailSum
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
        """Return the targets of a batch of the source; raises ``CorruptCacheError`` for ids that there are not."""
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


def cut_targets(targets: Targets, held: TargetsRecord, wanted: TargetsRecord) -> tuple[Targets, NDArray[np.bool_]]:
    """Cut targets of ``held`` to those of ``wanted``; return also which of the source's ids that drops, [P, K]."""
    num_P = _num_kept(targets, held, wanted)
    columns_K = np.arange(targets.top_k)
    dropped_PK = (columns_K >= num_P[:, None]) & ~np.isneginf(targets.logprobs_PK)
    changes: dict[str, Any] = {}
    if wanted.temperatures:
        changes["log_tails_PG"] = _log_tails(targets, dropped_PK, held, wanted)
    if dropped_PK.any():
        log_dropped_P = _log_sum_exp(targets.logprobs_PK, dropped_PK)
        changes["log_tail_P"] = np.logaddexp(targets.log_tail_P, log_dropped_P).astype(np.float32)
    ids_PK, logprobs_PK = targets.ids_PK[:, : wanted.top_k], targets.logprobs_PK[:, : wanted.top_k]
    if wanted.is_ragged:
        kept_PK = columns_K[: wanted.top_k] < num_P[:, None]
        ids_PK = np.where(kept_PK, ids_PK, ids_PK[:, :1])
        logprobs_PK = np.where(kept_PK, logprobs_PK, np.float32(-np.inf))
        changes["num_kept_P"] = num_P.astype(np.int32)
    changes.setdefault("log_tails_PG", None)
    return replace(targets, ids_PK=ids_PK, logprobs_PK=logprobs_PK, **changes), dropped_PK


def _num_kept(targets: Targets, held: TargetsRecord, wanted: TargetsRecord) -> NDArray[np.int64]:
    """Return how many ids each row keeps.

    Thresholds that the source has are not applied again: rounding could put an id on their other side.
    """
    held_P = np.full(targets.num_positions, targets.top_k) if targets.num_kept_P is None else targets.num_kept_P
    num_P = np.minimum(held_P.astype(np.int64), wanted.top_k)
    probs_PK = np.exp(targets.logprobs_PK)
    if wanted.min_prob > held.min_prob:
        num_P = np.minimum(num_P, (probs_PK >= wanted.min_prob).sum(axis=1))
    if wanted.min_mass < held.min_mass:
        num_P = np.minimum(num_P, (np.cumsum(probs_PK, axis=1) < wanted.min_mass).sum(axis=1) + 1)
    return num_P if wanted.kind == "sampled" else np.maximum(num_P, 1)


def _log_tails(
    targets: Targets, dropped_PK: NDArray[np.bool_], held: TargetsRecord, wanted: TargetsRecord
) -> NDArray[np.float32]:
    """Return the log of the mass outside the kept ids at the temperatures of ``wanted``."""
    assert targets.log_tails_PG is not None
    live_PK = ~np.isneginf(targets.logprobs_PK)
    columns = []
    for temperature in wanted.temperatures:
        log_tail_P = targets.log_tails_PG[:, held.temperatures.index(temperature)].astype(np.float64)
        tempered_PK = targets.logprobs_PK / np.float64(temperature)
        share_P = _log_sum_exp(tempered_PK, dropped_PK) - _log_sum_exp(tempered_PK, live_PK)
        with np.errstate(divide="ignore"):
            log_head_P = np.log1p(-np.minimum(np.exp(log_tail_P), 1))
        columns.append(np.logaddexp(log_tail_P, log_head_P + share_P))
    return np.stack(columns, axis=1).astype(np.float32)


def _log_sum_exp(values_PK: NDArray[Any], where_PK: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the logarithm of the sum of the exponentials of some values of each row, -inf where there are none."""
    chosen_PK = np.where(where_PK, values_PK, -np.inf).astype(np.float64)
    top_P = chosen_PK.max(axis=1, initial=-np.inf)
    shift_P = np.where(np.isneginf(top_P), 0, top_P)
    with np.errstate(divide="ignore"):
        total_P: NDArray[np.float64] = np.log(np.exp(chosen_PK - shift_P[:, None]).sum(axis=1)) + shift_P
    return total_P
