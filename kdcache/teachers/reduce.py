"""Reduce the teacher's logits to targets: the top k ids, and exact scalars of the full distribution.

This runs over every logit of the teacher, so it decides how much slower a dump is than the bare forward pass. Logits
come in chunks from the LM head and are reduced in smaller sub-chunks that stay in the processor's cache:

- *top-k in two steps*: the maximum of each of V / 24 strided blocks, then the top k among the elements of the k best
  blocks. Every element outside them is at most the smallest of k block maxima, so the values are exactly the top k.
- *one exponential*: the sum of ``exp(z - max)`` over all other ids is the tail, which is never computed as 1 - kept
  mass. The same sum weighted by z is the tail's part of the entropy. The k kept values are exponentiated separately.
- *the same two buffers throughout*: page faults of new megabytes cost more than the arithmetic on them.
- *everything else from the same exponentials*, while they are in the cache: ids that thresholds drop are put back,
  samples are drawn from them, and their weighted sum over positions is the tail prior. Only another temperature needs
  one more exponential of every logit.

All sums are float32 whatever the teacher's dtype; no [positions, vocabulary] float32 array exists beyond a sub-chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.errors import TeacherError
from kdcache.schema import Targets, TargetsRecord
from kdcache.teachers.samples import count_samples, sample_ids
from kdcache.words import count

#: Logits of a block: 16 to 48 are equally fast; with fewer the first step gets slow, with more the second.
_BLOCK = 24
#: Used for log 0: its exp is 0 in float32, and unlike -inf it survives a multiplication by 0.
_LOG_ZERO = -1e4


@dataclass(frozen=True)
class ChunkSizes:
    """How many positions go through the LM head at once, and how many through the reductions."""

    head: int
    reduce: int

    @classmethod
    def for_device(cls, device: torch.device) -> ChunkSizes:
        """Return sizes that measured well: small for the cache of a CPU, large for few launches on a GPU."""
        return cls(256, 32) if device.type == "cpu" else cls(2048, 512)


class TargetReducer:
    """Reduces logits to `Targets`, batch after batch, in buffers that are reused."""

    def __init__(self, record: TargetsRecord, chunks: ChunkSizes | None = None) -> None:
        self.record = record
        self._chunks = chunks
        self._buffers: Tensor | None = None
        self._is_ragged = record.is_ragged and record.top_k > 0
        # Replaces kept logits; low enough to be 0 after exp at the highest temperature too.
        self._log_zero = _LOG_ZERO * max((1.0, *record.temperatures))
        self._batch_sum_V: Tensor | None = None
        self._tail_sum_V: NDArray[np.float64] | None = None
        self._num_summed = 0

    @torch.inference_mode()
    def __call__(
        self, logits: Callable[[int, int], Tensor], labels_P: Tensor, uniforms_PN: NDArray[Any] | None = None
    ) -> Targets:
        """Reduce the logits of P positions.

        ``logits(start, stop)`` returns the rows [stop - start, V] over the true vocabulary in the teacher's dtype,
        valid until the next call. ``labels_P`` are gold labels (`NO_LABEL`: none; its log-probability is NaN).
        ``uniforms_PN`` are the numbers in [0, 1) that choose the samples, see `sample_uniforms`. Raises
        ``NonFiniteLogitsError`` when a row is NaN or +inf.
        """
        num_positions, device = len(labels_P), labels_P.device
        chunks = self._chunks or ChunkSizes.for_device(device)
        uniforms = self._uniforms(uniforms_PN, num_positions, device)
        self._batch_sum_V = None
        kept = []
        for start in range(0, num_positions, chunks.head):
            stop = min(start + chunks.head, num_positions)
            logits_CV = logits(start, stop)
            for first in range(start, stop, chunks.reduce):
                last = min(first + chunks.reduce, stop)
                rows = logits_CV[first - start : last - start]
                kept.append(self._reduce(rows, labels_P[first:last], uniforms[first:last], chunks.reduce))
        arrays: dict[str, Any] = {name: torch.cat([rows[name] for rows in kept]).cpu().numpy() for name in kept[0]}
        _check_finite(arrays)
        self._add_batch_sum(num_positions)
        if self.record.num_samples:
            arrays["samples"] = count_samples(arrays.pop("sampled_PN"), np.isneginf(arrays["log_tail_P"]))
        return Targets(**arrays)

    def take_tail_sum(self) -> tuple[NDArray[np.float64], int] | None:
        """Return the sum [V] of every id's probability where it was not kept, and the number of positions; reset both.

        None without ``tail_prior`` in the record, or when nothing was reduced since the last call.
        """
        taken = None if self._tail_sum_V is None else (self._tail_sum_V, self._num_summed)
        self._tail_sum_V, self._num_summed = None, 0
        return taken

    def _uniforms(self, uniforms_PN: NDArray[Any] | None, num_positions: int, device: torch.device) -> Tensor:
        """Return the uniform numbers as a tensor on ``device``; [P, 0] without samples."""
        expected = (num_positions, self.record.num_samples)
        found = (num_positions, 0) if uniforms_PN is None else uniforms_PN.shape
        if found != expected:
            raise ValueError(f"samples need uniform numbers of shape {expected}, found {found}")
        if uniforms_PN is None:
            return torch.empty(expected, device=device)
        return torch.from_numpy(uniforms_PN).to(device, torch.float64)

    def _reduce(self, logits_CV: Tensor, labels_C: Tensor, uniforms_CN: Tensor, max_rows: int) -> dict[str, Tensor]:
        values_CK, ids_CK, top_C1 = _best(logits_CV, self.record.top_k)
        head_CK = (values_CK.float() - top_C1).clamp_(min=_LOG_ZERO)
        asked_C1 = labels_C[:, None].clamp(min=0)  # NO_LABEL is below all ids
        gold_C = (logits_CV.gather(1, asked_C1).float() - top_C1).squeeze(1).clamp_(min=_LOG_ZERO)
        exp_CV, tail_C, weighted_tail_C, tails_GC = self._tail_sums(logits_CV, ids_CK, top_C1, max_rows)
        exp_CK = head_CK.exp()
        total_C = exp_CK.sum(1) + tail_C
        log_total_C = total_C.log()
        weighted_C = (exp_CK * head_CK).sum(1) + weighted_tail_C
        rows = {
            "ids_PK": ids_CK.to(torch.int32),
            "logprobs_PK": head_CK - log_total_C[:, None],
            "gold_logprob_P": (gold_C - log_total_C).masked_fill_(labels_C < 0, torch.nan),
            # NaN through 0 * NaN or NaN maxima is what _check_finite looks for.
            "entropy_P": log_total_C - weighted_C / total_C,
        }
        dropped_CK = self._shorten(rows) if self._is_ragged else None
        if dropped_CK is not None:
            exp_CV.scatter_(1, ids_CK, exp_CK * dropped_CK)
            tail_C = tail_C + (exp_CK * dropped_CK).sum(1)
        rows["log_tail_P"] = tail_C.log() - log_total_C
        if tails_GC:
            rows["log_tails_PG"] = self._log_tails(values_CK.float() - top_C1, dropped_CK, torch.stack(tails_GC, 1))
        if self.record.num_samples:
            rows["sampled_PN"] = sample_ids(exp_CV, uniforms_CN)
        if self.record.tail_prior:
            self._add_to_batch_sum(exp_CV, total_C)
        return rows

    def _tail_sums(
        self, logits_CV: Tensor, ids_CK: Tensor, top_C1: Tensor, max_rows: int
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return e = exp(logit - top), 0 for the ids in K, and its sums over the vocabulary.

        These are the sums of e, of e * log e, and of e to the power 1 / T for each temperature.
        """
        shifted_CV, exp_CV = self._workspace(max_rows, logits_CV)
        torch.sub(logits_CV, top_C1, out=shifted_CV)  # float32: the difference of two dtypes takes the wider
        shifted_CV.scatter_(1, ids_CK, self._log_zero)
        tails_GC = [torch.mul(shifted_CV, 1 / t, out=exp_CV).exp_().sum(1) for t in self.record.temperatures]
        torch.exp(shifted_CV, out=exp_CV)
        tail_C = exp_CV.sum(1)
        weighted_C = shifted_CV.mul_(exp_CV).sum(1)
        if torch.isnan(weighted_C).any():  # 0 * -inf: some ids have probability 0
            torch.sub(logits_CV, top_C1, out=shifted_CV).clamp_(min=_LOG_ZERO)
            shifted_CV.scatter_(1, ids_CK, _LOG_ZERO)
            weighted_C = shifted_CV.mul_(exp_CV).sum(1)
        return exp_CV, tail_C, weighted_C, tails_GC

    def _shorten(self, rows: dict[str, Tensor]) -> Tensor:
        """Cut each row to the ids that the record's thresholds keep; return which ids are dropped, [C, K]."""
        ids_CK, logprobs_CK = rows["ids_PK"], rows["logprobs_PK"]
        probs_CK = logprobs_CK.exp()
        num_kept_C = (probs_CK >= self.record.min_prob).sum(1)
        if self.record.min_mass < 1:  # at 1, rounding must not end the row early
            num_kept_C = num_kept_C.minimum((probs_CK.cumsum(1) < self.record.min_mass).sum(1) + 1)
        num_kept_C.clamp_(min=1)
        dropped_CK = torch.arange(ids_CK.shape[1], device=ids_CK.device) >= num_kept_C[:, None]
        rows["ids_PK"] = torch.where(dropped_CK, ids_CK[:, :1], ids_CK)
        rows["logprobs_PK"] = logprobs_CK.masked_fill(dropped_CK, -torch.inf)
        rows["num_kept_P"] = num_kept_C.to(torch.int32)
        return dropped_CK

    def _log_tails(self, head_CK: Tensor, dropped_CK: Tensor | None, tails_CG: Tensor) -> Tensor:
        """Return the log of the mass outside the kept ids at every temperature."""
        temperatures_G = torch.tensor(self.record.temperatures, device=head_CK.device)
        exp_CKG = (head_CK[:, :, None] / temperatures_G).exp()
        log_totals_CG = (exp_CKG.sum(1) + tails_CG).log()
        if dropped_CK is not None:
            tails_CG = tails_CG + (exp_CKG * dropped_CK[:, :, None]).sum(1)
        return tails_CG.log() - log_totals_CG

    def _add_to_batch_sum(self, exp_CV: Tensor, total_C: Tensor) -> None:
        if self._batch_sum_V is None:
            self._batch_sum_V = exp_CV.new_zeros(exp_CV.shape[1])
        self._batch_sum_V.addmv_(exp_CV.T, total_C.reciprocal())

    def _add_batch_sum(self, num_positions: int) -> None:
        """Add the sum of a batch, float32, to the total; batches that are not finite were rejected before."""
        if self._batch_sum_V is None:
            return
        batch_sum_V = self._batch_sum_V.cpu().numpy().astype(np.float64)
        self._tail_sum_V = batch_sum_V if self._tail_sum_V is None else self._tail_sum_V + batch_sum_V
        self._num_summed += num_positions

    def _workspace(self, max_rows: int, like_CV: Tensor) -> Tensor:
        """Return two float32 arrays of the shape of ``like_CV``."""
        num_rows, vocab_size = like_CV.shape
        buffers = self._buffers
        if buffers is None or buffers.device != like_CV.device or buffers.shape[1:] != (max_rows, vocab_size):
            buffers = torch.empty(2, max_rows, vocab_size, dtype=torch.float32, device=like_CV.device)
            self._buffers = buffers
        return buffers[:, :num_rows]


def reduce_top_k(
    logits: Callable[[int, int], Tensor], labels_P: Tensor, top_k: int, chunks: ChunkSizes | None = None
) -> Targets:
    """Reduce one batch of logits to its top k; see `TargetReducer`."""
    return TargetReducer(TargetsRecord(top_k=top_k), chunks)(logits, labels_P)


def _best(logits_CV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest values [C, K], their ids, and the maximum as float32 [C, 1], also for K = 0."""
    if not top_k:
        nothing_C0 = logits_CV[:, :0]
        return nothing_C0, nothing_C0.long(), logits_CV.amax(1, keepdim=True).float()
    values_CK, ids_CK = top_k_of(logits_CV, top_k)
    return values_CK, ids_CK, values_CK[:, :1].float()


def top_k_of(logits_CV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` largest values of each row, descending, and their ids; equal to ``torch.topk`` in values."""
    num_rows, vocab_size = logits_CV.shape
    num_blocks = vocab_size // _BLOCK
    if num_blocks < 4 * top_k or logits_CV.device.type != "cpu":
        return logits_CV.topk(top_k)  # on CUDA it is a radix select already
    blocked = num_blocks * _BLOCK
    blocks_CSN = logits_CV[:, :blocked].unflatten(1, (_BLOCK, num_blocks))
    best_CK = blocks_CSN.amax(1).topk(top_k, sorted=False).indices
    # Block n holds ids n, n + num_blocks, ...; the ids left over are always candidates.
    offsets_S = torch.arange(_BLOCK, device=logits_CV.device) * num_blocks
    candidates = (best_CK[:, None, :] + offsets_S[:, None]).flatten(1)
    rest = torch.arange(blocked, vocab_size, device=logits_CV.device).expand(num_rows, -1)
    candidates = torch.cat([candidates, rest], 1)
    values_CK, columns_CK = logits_CV.gather(1, candidates).topk(top_k)
    return values_CK, candidates.gather(1, columns_CK)


class NonFiniteLogitsError(TeacherError):
    """Logits are NaN or infinite; ``row`` is the first such position of the batch."""

    def __init__(self, row: int, num_bad: int) -> None:
        super().__init__(
            f"the teacher's logits are NaN or infinite at {count(num_bad, 'position')} of a batch, first at {row}"
        )
        self.row = row


def _check_finite(arrays: Mapping[str, NDArray[Any]]) -> None:
    best_is_finite = np.isfinite(arrays["logprobs_PK"][:, :1]).all(axis=1)
    bad = np.isnan(arrays["log_tail_P"]) | ~np.isfinite(arrays["entropy_P"]) | ~best_is_finite
    if bad.any():
        raise NonFiniteLogitsError(int(np.argmax(bad)), int(bad.sum()))
