"""Fewer kept ids from more: what is dropped goes to the tail, so that nothing of the teacher's mass is lost.

A smaller K or a threshold only moves the border between kept ids and tail. The dropped ids' log-probabilities are
known, so the new tail is the old tail plus their mass, never 1 minus the kept mass (rounding makes that negative).
The same holds at the other temperatures, where the kept ids' distribution is that of their log-probabilities over T,
scaled to the mass outside the stored tail. Gold token and entropy are of the full distribution and stay.

Everything is exact up to how the source rounded its numbers. Both a reader that asks for a smaller K and
``kdcache transcode`` come here. Shape suffixes: P positions, K ids of the source, G temperatures.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CacheError
from kdcache.schema import Targets, TargetsRecord


def with_top_k(held: TargetsRecord, top_k: int, where: str) -> TargetsRecord:
    """Return what becomes of targets of ``held`` when only ``top_k`` ids of every row are kept.

    Raises ``CacheError``, naming the cache as ``where``, for more ids than are held, fewer than one, and kinds of
    targets whose samples depend on K.
    """
    asked = f"{where}: top_k {top_k!r} was asked for"
    if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1:
        raise CacheError(f"{asked}; it must be a whole number from 1 to the {held.top_k} ids that the cache keeps")
    if held.kind == "sampled":
        raise CacheError(
            f"{asked}, but targets of the kind sampled keep no ids with their probabilities, only samples from the "
            "whole distribution; read them without top_k"
        )
    if top_k > held.top_k:
        raise CacheError(
            f"{asked}, but it keeps at most {held.top_k} ids at a position; ask for fewer, or dump the teacher again"
        )
    if held.kind == "hybrid" and top_k != held.top_k:
        raise CacheError(
            f"{asked}, but its {held.num_samples} samples are from the mass outside the {held.top_k} kept ids, and "
            "stand for no other K; read it without top_k"
        )
    return held.model_copy(update={"top_k": top_k})


def cut_targets(targets: Targets, held: TargetsRecord, wanted: TargetsRecord) -> tuple[Targets, NDArray[np.bool_]]:
    """Cut targets of ``held`` to those of ``wanted``; return also which of the source's ids that drops, [P, K]."""
    num_P = _num_kept(targets, held, wanted)
    columns_K = np.arange(targets.top_k)
    # Columns are contiguous, as decoded ones are.
    dropped_PK = ((columns_K[:, None] >= num_P) & ~np.isneginf(targets.logprobs_PK.T)).T
    changes: dict[str, Any] = {}
    if wanted.temperatures:
        changes["log_tails_PG"] = _log_tails(targets, dropped_PK, held, wanted)
    if dropped_PK.any():
        first = int(num_P.min())  # no row drops an id before it
        log_dropped_P = _log_sum_exp(targets.logprobs_PK[:, first:], dropped_PK[:, first:])
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
    if wanted.min_prob > held.min_prob:
        num_P = np.minimum(num_P, (np.exp(targets.logprobs_PK) >= wanted.min_prob).sum(axis=1))
    if wanted.min_mass < held.min_mass:
        mass_PK = np.cumsum(np.exp(targets.logprobs_PK), axis=1)
        num_P = np.minimum(num_P, (mass_PK < wanted.min_mass).sum(axis=1) + 1)
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
            log_kept_P = np.log1p(-np.minimum(np.exp(log_tail_P), 1))
        columns.append(np.logaddexp(log_tail_P, log_kept_P + share_P))
    return np.stack(columns, axis=1).astype(np.float32)


def _log_sum_exp(values_PK: NDArray[Any], where_PK: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the logarithm of the sum of the exponentials of some values of each row, -inf where there are none."""
    chosen_KP = np.where(where_PK.T, values_PK.T, -np.inf).astype(np.float64)
    top_P = chosen_KP.max(axis=0, initial=-np.inf)
    shift_P = np.where(np.isneginf(top_P), 0, top_P)
    with np.errstate(divide="ignore"):
        total_P: NDArray[np.float64] = np.log(np.exp(chosen_KP - shift_P).sum(axis=0)) + shift_P
    return total_P
