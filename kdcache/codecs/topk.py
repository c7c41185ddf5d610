"""Codecs of top-k targets: float32 log-probabilities in, small integer and half-precision arrays out, and back.

A codec changes *meaning to numbers* only (gaps, grids, rank tables); packing the numbers into bytes is left to Zarr's
own codecs, so any Zarr reader opens the arrays. What every codec promises: the decoded head and tail form a proper
distribution, because the quantised head is re-normalised to the mass that the *stored* tail leaves. The tail is never
derived from the head: rounding the head to half precision would already make it negative.

======= ===================================================== ==========================================
codec   head                                                  use it for
======= ===================================================== ==========================================
compact log-probability gaps on a grid of 1/16 nat, one byte, sharing and training (the default)
        ids as frequency ranks with a table per shard
fp16    float16 log-probabilities                             comparing with other tools
bf16    bfloat16 log-probabilities                            comparing with other tools
exact   float32, every scalar float32                         proofs: decodes to the bit
======= ===================================================== ==========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.codecs.floats import BF16, FP16, FP32, FloatFormat
from kdcache.config import Config
from kdcache.errors import CorruptCacheError
from kdcache.schema import ArrayRecord, Targets

Arrays = Mapping[str, NDArray[Any]]

_SCALARS = ("log_tail", "gold_logprob", "entropy")
#: exp(-2048) is 0 in float32, so nothing below it can matter; keeps grid arithmetic in range where a logit is -inf.
_FLOOR = -2048.0


class TopKCodec(Config):
    """Base: stores the scalars of every row beside the head that a subclass encodes."""

    name: str
    scalar_dtype: Literal["float16", "float32"] = "float16"

    @property
    def kl_bound(self) -> float:
        """Mean KL (nats), original to decoded, that no real teacher exceeds; for checks against the teacher."""
        raise NotImplementedError

    def encode(self, targets: Targets, vocab_size: int) -> dict[str, NDArray[Any]]:
        """Encode P rows; ids must be below ``vocab_size`` and log-probabilities must not increase along K."""
        scalars = {
            "log_tail": targets.log_tail_P,
            "gold_logprob": targets.gold_logprob_P,
            "entropy": targets.entropy_P,
        }
        encoded = {name: np.asarray(value).astype(self.scalar_dtype) for name, value in scalars.items()}
        return {**self._encode_head(targets, vocab_size), **encoded}

    def decode(self, arrays: Arrays) -> Targets:
        """Decode rows (any slice of the per-position arrays, with the whole of every table)."""
        log_tail_P = arrays["log_tail"].astype(np.float32)
        ids_PK, head_PK = self._decode_head(arrays)
        return Targets(
            ids_PK=ids_PK,
            logprobs_PK=self._normalise(head_PK, log_tail_P),
            log_tail_P=log_tail_P,
            gold_logprob_P=arrays["gold_logprob"].astype(np.float32),
            entropy_P=arrays["entropy"].astype(np.float32),
        )

    def arrays(self, top_k: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
        """Describe the arrays that `encode` returns."""
        scalars = [ArrayRecord(name=name, dtype=self.scalar_dtype, rows="positions") for name in _SCALARS]
        return (*self._head_arrays(top_k, vocab_size), *scalars)

    def _normalise(self, head_PK: NDArray[np.float32], log_tail_P: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale the head to the mass 1 - tail, in place."""
        # The head always holds some mass, but half precision can round a tail of 0.9999999 up to 1.
        tail_P = np.minimum(np.exp(log_tail_P), np.float32(1 - 2**-23))
        shift_P = np.log1p(-tail_P) - np.log(np.exp(head_PK).sum(axis=1))
        head_PK += shift_P[:, None]
        return head_PK

    def _encode_head(self, targets: Targets, vocab_size: int) -> dict[str, NDArray[Any]]:
        raise NotImplementedError

    def _decode_head(self, arrays: Arrays) -> tuple[NDArray[Any], NDArray[np.float32]]:
        raise NotImplementedError

    def _head_arrays(self, top_k: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
        raise NotImplementedError


def id_dtype(vocab_size: int) -> str:
    """Return the smallest unsigned dtype that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class CompactCodec(TopKCodec):
    """Gaps between neighbouring ranks on a log grid, one byte each; ids as frequency ranks of the shard.

    The *cumulated* gap is rounded to ``1 / grid`` nat, so errors do not add up along K: every kept log-probability is
    off by at most ``0.5 / grid`` before normalisation, at any temperature. A step of more than 255 / grid nats
    (15.9 by default: a factor of 8 million) is stored as 255.
    """

    name: Literal["compact"] = "compact"
    grid: int = Field(default=16, ge=1, le=64)

    @property
    def kl_bound(self) -> float:
        return 5e-4 * (16 / self.grid) ** 2  # rounding costs the square of its step; measured 9e-5 at 16

    def _encode_head(self, targets: Targets, vocab_size: int) -> dict[str, NDArray[Any]]:
        below_top_PK = targets.logprobs_PK[:, :1] - np.maximum(targets.logprobs_PK, np.float32(_FLOOR))
        codes_PK = np.rint(below_top_PK * np.float32(self.grid)).astype(np.int32)
        gaps_PK = np.diff(codes_PK, axis=1, prepend=0)
        ranks_PK, table = _rank_by_frequency(targets.ids_PK, vocab_size)
        return {"topk_ranks": ranks_PK, "topk_gaps": np.minimum(gaps_PK, 255).astype(np.uint8), "id_table": table}

    def _decode_head(self, arrays: Arrays) -> tuple[NDArray[Any], NDArray[np.float32]]:
        ranks_PK, table = arrays["topk_ranks"], arrays["id_table"]
        if ranks_PK.size and int(ranks_PK.max()) >= len(table):
            raise CorruptCacheError(f"topk_ranks holds {int(ranks_PK.max())}, but id_table has {len(table)} entries")
        head_PK = np.cumsum(arrays["topk_gaps"], axis=1, dtype=np.float32)
        head_PK *= np.float32(-1 / self.grid)
        return table[ranks_PK], head_PK

    def _head_arrays(self, top_k: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
        return (
            ArrayRecord(name="topk_ranks", dtype=id_dtype(vocab_size), rows="positions", shape=(top_k,)),
            ArrayRecord(name="topk_gaps", dtype="uint8", rows="positions", shape=(top_k,)),
            ArrayRecord(name="id_table", dtype=id_dtype(vocab_size), rows="table"),
        )


def _rank_by_frequency(ids_PK: NDArray[Any], vocab_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Replace ids by their frequency rank among these rows; return the ranks and the id of every rank used.

    Frequent ids become small numbers whose high bits are mostly zero, which the byte-level compressor then removes.
    """
    counts = np.bincount(ids_PK.reshape(-1), minlength=vocab_size)
    table = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rank_of_id = np.zeros(vocab_size, dtype=id_dtype(vocab_size))
    rank_of_id[table] = np.arange(len(table))
    return rank_of_id[ids_PK], table.astype(id_dtype(vocab_size))


class _LogprobCodec(TopKCodec):
    """Base of the codecs that store ids as they are and one log-probability each, in the subclass's float format."""

    _format: ClassVar[FloatFormat]
    _kl_bound: ClassVar[float]

    @property
    def kl_bound(self) -> float:
        return self._kl_bound

    def _encode_head(self, targets: Targets, vocab_size: int) -> dict[str, NDArray[Any]]:
        ids_PK = targets.ids_PK.astype(id_dtype(vocab_size))
        return {"topk_ids": ids_PK, "topk_logprobs": self._format.pack(targets.logprobs_PK)}

    def _decode_head(self, arrays: Arrays) -> tuple[NDArray[Any], NDArray[np.float32]]:
        return arrays["topk_ids"], self._format.unpack(arrays["topk_logprobs"])

    def _head_arrays(self, top_k: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
        return (
            ArrayRecord(name="topk_ids", dtype=id_dtype(vocab_size), rows="positions", shape=(top_k,)),
            ArrayRecord(name="topk_logprobs", dtype=self._format.dtype, rows="positions", shape=(top_k,)),
        )


class Fp16Codec(_LogprobCodec):
    """Float16 log-probabilities."""

    name: Literal["fp16"] = "fp16"
    _format = FP16
    _kl_bound = 1e-4


class Bf16Codec(_LogprobCodec):
    """Bfloat16 log-probabilities, stored as the 16 bits of each."""

    name: Literal["bf16"] = "bf16"
    _format = BF16
    _kl_bound = 5e-4


class ExactCodec(_LogprobCodec):
    """Float32 everywhere; decodes to the bit, and is therefore not re-normalised."""

    name: Literal["exact"] = "exact"
    scalar_dtype: Literal["float16", "float32"] = "float32"
    _format = FP32
    _kl_bound = 1e-6

    def _normalise(self, head_PK: NDArray[np.float32], log_tail_P: NDArray[np.float32]) -> NDArray[np.float32]:
        return head_PK


#: Every codec of top-k targets by its name on the command line.
TOPK_CODECS: dict[str, type[TopKCodec]] = {
    "compact": CompactCodec,
    "bf16": Bf16Codec,
    "fp16": Fp16Codec,
    "exact": ExactCodec,
}
