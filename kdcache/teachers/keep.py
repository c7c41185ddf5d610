"""What is kept of the teacher's logits: the top k, and exact scalars of the full distribution.

This runs over every logit the teacher makes, so it decides how much slower a dump is than the bare forward. Logits
come in chunks from the LM head and are reduced in smaller sub-chunks that stay in the processor's cache:

- *top-k in two steps*: the maximum of each of V / 24 strided blocks, then the top k among the elements of the k best
  blocks. Every element outside them is at most the smallest of k block maxima, so the values are exactly the top k.
- *one exponential*: with the kept ids taken out, ``exp(z - max)`` summed is the tail (never 1 - head) and, weighted by
  z, the tail's share of the entropy; the head's k values are exponentiated apart.
- *the same two buffers throughout*: fresh megabytes cost more in page faults than the arithmetic on them.

All sums are float32 whatever the teacher's dtype; no [positions, vocabulary] float32 array exists beyond a sub-chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import TeacherError
from kdcache.schema import Targets

#: Blocks of this many logits; 16 to 48 measure alike, below that the first step gets slow, above that the second.
_BLOCK = 24
#: Stands for log 0: exp of it is 0 in float32, and it survives arithmetic that -inf does not.
_LOG_ZERO = -1e4


@dataclass(frozen=True)
class ChunkSizes:
    """How many positions go through the LM head at once, and how many through the reductions."""

    head: int
    reduce: int

    @classmethod
    def for_device(cls, device: torch.device) -> ChunkSizes:
        """Return sizes that measured well: a CPU wants its cache, a GPU wants few launches."""
        return cls(256, 32) if device.type == "cpu" else cls(2048, 512)


class TopKeeper:
    """Reduces logits to `Targets`, batch after batch, in buffers that it keeps."""

    def __init__(self, top_k: int, chunks: ChunkSizes | None = None) -> None:
        self.top_k = top_k
        self._chunks = chunks
        self._buffers: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, logits: Callable[[int, int], Tensor], labels_P: Tensor) -> Targets:
        """Reduce the logits of P positions.

        ``logits(start, stop)`` returns the rows [stop - start, V] over the true vocabulary in the teacher's dtype,
        valid until the next call; ``labels_P`` are the corpus's own next tokens. Raises ``NonFiniteLogitsError``
        when a row is NaN or +inf.
        """
        chunks = self._chunks or ChunkSizes.for_device(labels_P.device)
        num_positions = len(labels_P)
        kept = []
        for start in range(0, num_positions, chunks.head):
            stop = min(start + chunks.head, num_positions)
            logits_CV = logits(start, stop)
            labels_C = labels_P[start:stop]
            for first in range(0, stop - start, chunks.reduce):
                last = first + chunks.reduce
                kept.append(self._reduce(logits_CV[first:last], labels_C[first:last], chunks.reduce))
        ids, logprobs, log_tail, gold, entropy = (torch.cat(parts).cpu().numpy() for parts in zip(*kept, strict=True))
        _check_finite(log_tail, entropy, logprobs)
        return Targets(ids, logprobs, log_tail, gold, entropy)

    def _reduce(self, logits_CV: Tensor, labels_C: Tensor, max_rows: int) -> tuple[Tensor, ...]:
        values_CK, ids_CK = top_k_of(logits_CV, self.top_k)
        top_C1 = values_CK[:, :1].float()
        head_CK = (values_CK.float() - top_C1).clamp_(min=_LOG_ZERO)
        gold_C = (logits_CV.gather(1, labels_C[:, None]).float() - top_C1).squeeze(1).clamp_(min=_LOG_ZERO)
        tail_C, weighted_tail_C = self._tail_sums(logits_CV, ids_CK, top_C1, max_rows)
        exp_CK = head_CK.exp()
        total_C = exp_CK.sum(1) + tail_C
        log_total_C = total_C.log()
        weighted_C = (exp_CK * head_CK).sum(1) + weighted_tail_C
        return (
            ids_CK.to(torch.int32),
            head_CK - log_total_C[:, None],
            tail_C.log() - log_total_C,
            gold_C - log_total_C,
            # NaN through 0 * NaN or NaN maxima is what _check_finite looks for.
            log_total_C - weighted_C / total_C,
        )

    def _tail_sums(self, logits_CV: Tensor, ids_CK: Tensor, top_C1: Tensor, max_rows: int) -> tuple[Tensor, Tensor]:
        """Return the sums of e and of e * log e over the ids outside K, for e = exp(logit - top)."""
        shifted_CV, exp_CV = self._workspace(max_rows, logits_CV)
        torch.sub(logits_CV, top_C1, out=shifted_CV)  # float32: the difference of two dtypes takes the wider
        shifted_CV.scatter_(1, ids_CK, _LOG_ZERO)
        torch.exp(shifted_CV, out=exp_CV)
        tail_C = exp_CV.sum(1)
        weighted_C = shifted_CV.mul_(exp_CV).sum(1)
        if torch.isnan(weighted_C).any():  # 0 * -inf: the teacher rules some ids out entirely
            torch.sub(logits_CV, top_C1, out=shifted_CV).clamp_(min=_LOG_ZERO)
            shifted_CV.scatter_(1, ids_CK, _LOG_ZERO)
            weighted_C = shifted_CV.mul_(exp_CV).sum(1)
        return tail_C, weighted_C

    def _workspace(self, max_rows: int, like_CV: Tensor) -> Tensor:
        """Return two float32 arrays of the shape of ``like_CV``."""
        num_rows, vocab_size = like_CV.shape
        buffers = self._buffers
        if buffers is None or buffers.device != like_CV.device or buffers.shape[1:] != (max_rows, vocab_size):
            buffers = torch.empty(2, max_rows, vocab_size, dtype=torch.float32, device=like_CV.device)
            self._buffers = buffers
        return buffers[:, :num_rows]


def keep_top_k(
    logits: Callable[[int, int], Tensor], labels_P: Tensor, top_k: int, chunks: ChunkSizes | None = None
) -> Targets:
    """Reduce one batch of logits to `Targets`; see `TopKeeper`."""
    return TopKeeper(top_k, chunks)(logits, labels_P)


def top_k_of(logits_CV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` largest values of each row, descending, and their ids; equal to ``torch.topk`` in values."""
    num_rows, vocab_size = logits_CV.shape
    num_blocks = vocab_size // _BLOCK
    if num_blocks < 4 * top_k or logits_CV.device.type != "cpu":
        return logits_CV.topk(top_k)  # CUDA's own selection is a radix select already
    blocked = num_blocks * _BLOCK
    blocks_CSN = logits_CV[:, :blocked].unflatten(1, (_BLOCK, num_blocks))
    best_CK = blocks_CSN.amax(1).topk(top_k, sorted=False).indices
    # Block n holds ids n, n + num_blocks, ...; what does not fill a block is always a candidate.
    offsets_S = torch.arange(_BLOCK, device=logits_CV.device) * num_blocks
    candidates = (best_CK[:, None, :] + offsets_S[:, None]).flatten(1)
    rest = torch.arange(blocked, vocab_size, device=logits_CV.device).expand(num_rows, -1)
    candidates = torch.cat([candidates, rest], 1)
    values_CK, places_CK = logits_CV.gather(1, candidates).topk(top_k)
    return values_CK, candidates.gather(1, places_CK)


class NonFiniteLogitsError(TeacherError):
    """The teacher answered NaN or infinity; ``row`` is the first such position of the batch."""

    def __init__(self, row: int, num_bad: int) -> None:
        super().__init__(f"the teacher's logits are NaN or infinite at {num_bad} positions of a batch, first at {row}")
        self.row = row


def _check_finite(log_tail: np.ndarray, entropy: np.ndarray, logprobs: np.ndarray) -> None:
    bad = np.isnan(log_tail) | ~np.isfinite(entropy) | ~np.isfinite(logprobs[:, 0])
    if bad.any():
        raise NonFiniteLogitsError(int(np.argmax(bad)), int(bad.sum()))
