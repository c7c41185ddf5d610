"""Distances between stored rows and the teacher: exact rows compared with decoded ones, in float64.

t is the teacher's distribution, q the stored row: probabilities of the kept ids, and a mass m' for all others (m the
exact one). Three distances, in nats unless said otherwise:

- *KL of the codec*: KL(t || q) over the kept ids and the tail as one outcome: what encoding loses of the kept ids.
- *full-vocabulary KL*: KL(t || c) where c completes q to a distribution over all ids, spreading m' over the ids that
  were not kept in proportion to some weights (`Spread`): uniform, or the tail prior. With q and the sum of t log weight
  known, no array over the vocabulary is needed: KL = -H(t) - sum_K t log q - sum_outside t log c.
- *batch-mean error of the target*: the L2 norm, over the vocabulary, of the mean over a batch of positions of
  (target - t); the mean over batches. What a student sees in a batch is off by that in its output bias. It falls with
  the square root of the batch for unbiased targets and not at all for biased ones, so the batch size must be fixed:
  `BATCH_POSITIONS` positions.

Shape suffixes: P positions, J ids of a row, V vocabulary, H halves of the sample, Q batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CacheError
from kdcache.schema import FloatArray, IntArray, Targets

Float64 = NDArray[np.float64]

#: Positions of the batches over which mean targets are compared with the teacher's mean distribution.
BATCH_POSITIONS = 4096


@dataclass(frozen=True)
class Rows:
    """Rows sorted by id; padding comes last, with the id ``vocab_size`` and log-probability -inf."""

    ids_PJ: NDArray[np.int64]
    logprobs_PJ: Float64
    log_tail_P: Float64
    vocab_size: int

    @classmethod
    def of(cls, ids_PJ: IntArray, logprobs_PJ: FloatArray, log_tail_P: FloatArray, vocab_size: int) -> Rows:
        """Sort rows of distinct ids; entries with log-probability -inf are padding."""
        known_PJ = np.where(np.isneginf(logprobs_PJ), vocab_size, ids_PJ.astype(np.int64))
        order_PJ = np.argsort(known_PJ, axis=1, kind="stable")
        ordered_PJ = np.take_along_axis(logprobs_PJ.astype(np.float64), order_PJ, axis=1)
        return cls(
            np.take_along_axis(known_PJ, order_PJ, axis=1), ordered_PJ, log_tail_P.astype(np.float64), vocab_size
        )

    @classmethod
    def of_targets(cls, targets: Targets, vocab_size: int) -> Rows:
        """Sort the rows that losses use; samples, if there are any, replace the tail."""
        return cls.of(*targets.merged(), vocab_size)

    @property
    def is_id_PJ(self) -> NDArray[np.bool_]:
        """False at padding."""
        return self.ids_PJ < self.vocab_size

    @property
    def num_kept_P(self) -> NDArray[np.int64]:
        """Number of ids of every row."""
        return self.is_id_PJ.sum(axis=1)

    def renormalised(self) -> Rows:
        """Return the rows scaled to mass 1, without a tail."""
        masses_P1 = np.exp(self.logprobs_PJ).sum(axis=1, keepdims=True)
        scaled_PJ = self.logprobs_PJ - np.log(masses_P1)
        return Rows(self.ids_PJ, scaled_PJ, np.full(len(masses_P1), -np.inf), self.vocab_size)


@dataclass(frozen=True)
class Spread:
    """Weights by which the tail's mass is spread over the ids that were not kept: row ``half_P[p]`` of ``weights_HV``.

    ``cross_P`` is the sum over the vocabulary of teacher probability x log weight.
    """

    weights_HV: Float64
    half_P: NDArray[np.int64]
    cross_P: Float64

    @classmethod
    def uniform(cls, vocab_size: int, num_positions: int) -> Spread:
        """Return equal weights."""
        return cls(np.ones((1, vocab_size)), np.zeros(num_positions, np.int64), np.zeros(num_positions))

    def at(self, rows: Rows) -> Float64:
        """Return the weights at the ids of rows, [P, J], 0 at padding."""
        padded_HV = np.pad(self.weights_HV, ((0, 0), (0, 1)))
        return padded_HV[self.half_P[:, None], rows.ids_PJ]

    def outside(self, rows: Rows) -> Float64:
        """Return the sum of the weights of ids outside every row, [P]; rounding does not make it negative."""
        totals_P = self.weights_HV.sum(axis=1)[self.half_P]
        rest_P = totals_P - self.at(rows).sum(axis=1)
        return np.where(rest_P > 1e-12 * totals_P, rest_P, 0.0)


def _xlogy(x: Float64, log_y: Float64) -> Float64:
    """Return x log y, 0 where x is 0."""
    with np.errstate(invalid="ignore"):
        return np.where(x > 0, x * log_y, 0.0)


def codec_kl(exact: Rows, decoded: Rows) -> float:
    """Return the mean KL, exact to decoded, over the kept ids and the tail; raises ``CacheError`` for other ids."""
    if not np.array_equal(exact.ids_PJ, decoded.ids_PJ):
        raise CacheError("a codec decoded other ids than it encoded; this is a defect of kdcache, please report it")
    probs_PJ, tail_P = np.exp(exact.logprobs_PJ), np.exp(exact.log_tail_P)
    with np.errstate(invalid="ignore"):
        head_PJ = _xlogy(probs_PJ, exact.logprobs_PJ - decoded.logprobs_PJ)
        tail_terms_P = _xlogy(tail_P, exact.log_tail_P - decoded.log_tail_P)
    return float((head_PJ.sum(axis=1) + tail_terms_P).mean())


def full_kl(exact: Rows, decoded: Rows, entropy_P: FloatArray, spread: Spread) -> float:
    """Return the mean KL from the teacher to decoded rows that are completed by ``spread``.

    Infinite where the teacher has mass outside the kept ids and the completed row has none.
    """
    probs_PJ, tail_P = np.exp(exact.logprobs_PJ), np.exp(exact.log_tail_P)
    head_P = _xlogy(probs_PJ, decoded.logprobs_PJ).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cross_P = spread.cross_P - _xlogy(probs_PJ, np.log(spread.at(exact))).sum(axis=1)
        rest_P = _xlogy(tail_P, decoded.log_tail_P - np.log(spread.outside(exact))) + cross_P
    return float((-entropy_P.astype(np.float64) - head_P - np.where(tail_P > 0, rest_P, 0.0)).mean())


def within_tail_kl(exact: Rows, entropy_P: FloatArray) -> float:
    """Return the mean of m KL(tail || flat tail): the KL that remains for a student with the right tail mass."""
    return full_kl(exact, exact, entropy_P, Spread.uniform(exact.vocab_size, len(entropy_P)))


def batches_of(num_positions: int) -> Iterator[slice]:
    """Return the batches over which means are taken: whole ones, or all positions if there are fewer."""
    size = min(BATCH_POSITIONS, num_positions)
    return (slice(start, start + size) for start in range(0, num_positions - size + 1, size))


def batch_mean_error(rows: Rows, means_QV: Float64, spread: Spread | None = None) -> float:
    """Return the batch-mean error of rows as they are, or completed by ``spread``; ``means_QV`` are the teacher's."""
    errors = [
        float(np.linalg.norm(_mean_target(rows, batch, spread) - mean_V))
        for batch, mean_V in zip(batches_of(len(rows.ids_PJ)), means_QV, strict=True)
    ]
    return float(np.mean(errors))


def _mean_target(rows: Rows, batch: slice, spread: Spread | None) -> Float64:
    part = Rows(rows.ids_PJ[batch], rows.logprobs_PJ[batch], rows.log_tail_P[batch], rows.vocab_size)
    probs_PJ, added_V = np.exp(part.logprobs_PJ), np.zeros(rows.vocab_size)
    if spread is not None:
        own = Spread(spread.weights_HV, spread.half_P[batch], spread.cross_P[batch])
        outside_P = own.outside(part)
        share_P = np.where(outside_P > 0, np.exp(part.log_tail_P) / np.maximum(outside_P, 1e-300), 0.0)
        added_V = np.bincount(own.half_P, share_P, len(own.weights_HV)) @ own.weights_HV
        probs_PJ = probs_PJ - share_P[:, None] * own.at(part)  # kept ids get none of it
    sums_V = np.bincount(part.ids_PJ.reshape(-1), probs_PJ.reshape(-1), rows.vocab_size + 1)[:-1] + added_V
    return sums_V / len(probs_PJ)
