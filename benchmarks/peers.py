"""Layouts that other projects publish for cached teachers, re-implemented from their descriptions for measurement only.

A benchmark compares their bytes and losses with those of kdcache on the same logits. None of them is a codec of
kdcache, and nothing here reads or writes the files of those projects. Containers (Parquet, tar), token ids and metadata
are not counted, in their favour. The sources of the numbers:

DistillKit (arcee-ai/DistillKit, commit a61c2e7 of March 2026)
    README, "Logit Compression": the recommended configuration (k 128, 16 exact values in bfloat16, polynomial terms
    0 1 2 3 4 sqrt in float32) and the budget pick (k 50, 1 exact, terms 0 1 sqrt); both without residual bins, delta
    encoding and error diffusion. ``normalize_t`` is off by default (compression/config.py); the normalised variant is
    the recommended configuration with it. Ids take ceil(log2 V) bits, every row is filled up to whole bytes. Its
    Parquet (snappy) file, token ids included, came to 311 and 118 bytes per token on 4,096 positions of SmolLM2 where
    the rows alone have 312 and 114 (V = 49,152).
    Capture hands float32 log-probabilities on the CPU to a least-squares fit by ``torch.linalg.svd``. At t = 0..111
    the columns 1 and t^4 differ by a factor of 1.5e8, more than float32 resolves; with the LAPACK of torch's x86
    wheels (MKL) the small singular values are rounding noise and the fit breaks: KL .04 to .09 on those positions,
    changing with the number of threads, against .0002 with t in [0, 1] or a fit in float64. numpy's own float32 SVD
    (OpenBLAS) is accurate on this matrix and would hide it, so the fit here goes through torch as well.
Megatron-LM offline distillation (NVIDIA/Megatron-LM)
    User guide of the dev branch, "On-Disk Format": float16 log-probabilities, the lower 16 bits of the ids, the 17th
    bits packed 8 to a byte; megatron/training/distillation/logits_saver.py (commit d98e8a6 of main, August 2026,
    which still gives every 17th bit a byte): zstd level 3 over all arrays of an iteration, [positions, k] in rows.
    k has no default on main and is 128 in the user guide; 64 is chosen here to match kdcache's.
Sparse Logit Sampling (Anshumann et al., ACL 2025, arXiv 2503.16870; no code published)
    24 bits for each distinct drawn token, 17 for its id and 7 for how often it was drawn; N = 50 samples at temperature
    1. The number of entries of a position, one byte here, is not described. With zstd level 9 as a variant.

All decoders return what is stored. None stores a tail: that the Megatron-LM student adds a ghost token of mass
1 - sum, and DistillKit renormalises or spreads the rest, is a choice of the loss and left to whoever compares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from kdcache.codecs.floats import BF16
from kdcache.config import Config
from kdcache.errors import ConfigError
from kdcache.schema import IntArray

#: Rows whose bits are spread out to bytes at once.
BLOCK_ROWS = 4096
#: Ids of Megatron-LM and of Sparse Logit Sampling have 17 bits, counts of the latter 7.
ID_BITS, COUNT_BITS = 17, 7


@dataclass(frozen=True)
class TopLogprobs:
    """The K most probable ids of P positions, most probable first, and their natural log-probabilities."""

    ids_PK: NDArray[np.int32]
    logprobs_PK: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.ids_PK.shape != self.logprobs_PK.shape or self.ids_PK.ndim != 2:
            raise ConfigError(
                f"ids and log-probabilities must both be [positions, k], found {self.ids_PK.shape} and "
                f"{self.logprobs_PK.shape}"
            )
        if not np.isfinite(self.logprobs_PK).all() or (np.diff(self.logprobs_PK, axis=1) > 0).any():
            raise ConfigError(
                "log-probabilities must be finite and fall along every row: sort them, most probable first"
            )


@dataclass(frozen=True)
class TeacherSample:
    """The targets of a teacher at P positions: its top-k, and N independent samples from its whole distribution."""

    vocab_size: int
    top: TopLogprobs | None = None
    samples_PN: IntArray | None = None

    def __post_init__(self) -> None:
        for ids in (self.top.ids_PK if self.top else None, self.samples_PN):
            if ids is not None and not ids.size:
                raise ConfigError(f"a sample must have at least one position and one id, found shape {ids.shape}")
            if ids is not None and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                raise ConfigError(
                    f"ids must be in [0, {self.vocab_size:,}), found {ids.min():,} to {ids.max():,}: "
                    "check the vocabulary size"
                )

    def first(self, top_k: int) -> TopLogprobs:
        """Return the ``top_k`` most probable ids; raises ``ConfigError`` if fewer are known."""
        found = self.top.ids_PK.shape[1] if self.top else 0
        if self.top is None or found < top_k:
            raise ConfigError(f"this layout stores the {top_k} most probable ids, found {found}: keep more of them")
        return TopLogprobs(self.top.ids_PK[:, :top_k], self.top.logprobs_PK[:, :top_k])


@dataclass(frozen=True)
class PeerRows:
    """Decoded rows: ids and probabilities as they were stored (not renormalised), 0 in padding.

    ``has_tail`` says whether the mass of all other ids is stored too.
    """

    ids_PJ: NDArray[np.int32]
    probs_PJ: NDArray[np.float32]
    has_tail: bool = False


@dataclass(frozen=True)
class Encoded:
    """The bytes of a layout, and how to read them; ``decode`` uses the bytes and the shapes only."""

    payload: list[bytes]
    decode: Callable[[], PeerRows]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(len(part) for part in self.payload)


class Peer(Config, ABC):
    """A published layout; ``source`` says where the numbers come from, in a few words for a table."""

    source: str

    @abstractmethod
    def encode(self, sample: TeacherSample) -> Encoded:
        """Encode all positions; raises ``ConfigError`` if the layout cannot hold them."""


# ------------------------------------------------------------------------------------------------------ DistillKit


class PolynomialPeer(Peer):
    """DistillKit: the first values in bfloat16, a least-squares fit over the rank for all others, ids bit-packed."""

    top_k: int
    num_exact: int
    terms: tuple[int | Literal["sqrt"], ...]
    """Powers of t, the rank after the exact values; ``sqrt`` is its square root."""
    normalise: bool = False
    """Whether t runs over [0, 1] instead of 0, 1, 2, ..."""
    fit_dtype: Literal["float32", "float64"] = "float32"
    """Of the least-squares solution; only float32 is what a capture does."""

    def encode(self, sample: TeacherSample) -> Encoded:
        top = sample.first(self.top_k)
        exact = BF16.pack(top.logprobs_PK[:, : self.num_exact]).astype("<u2")
        fitted = self._fit(top.logprobs_PK[:, self.num_exact :]).astype("<f4")
        values = np.concatenate([_bytes_of_rows(exact), _bytes_of_rows(fitted)], axis=1)
        # ceil(log2 V) without floating point.
        num_bits = max(1, (sample.vocab_size - 1).bit_length())
        payload = [values.tobytes(), pack_bits(top.ids_PK, num_bits).tobytes()]
        return Encoded(payload, partial(self._decode, payload, len(values), num_bits))

    def _decode(self, payload: list[bytes], num_positions: int, num_bits: int) -> PeerRows:
        values = np.frombuffer(payload[0], np.uint8).reshape(num_positions, 2 * self.num_exact + 4 * len(self.terms))
        exact = np.ascontiguousarray(values[:, : 2 * self.num_exact]).view("<u2")
        coefficients_PM = np.ascontiguousarray(values[:, 2 * self.num_exact :]).view("<f4")
        fitted = coefficients_PM @ self._basis("float32").T
        packed = np.frombuffer(payload[1], np.uint8).reshape(num_positions, -(-self.top_k * num_bits // 8))
        probs = np.exp(np.concatenate([BF16.unpack(exact), fitted], axis=1))
        return PeerRows(unpack_bits(packed, num_bits, self.top_k), probs)

    def _basis(self, dtype: str) -> NDArray[Any]:
        """Return the value of every term at every fitted rank, [K - num_exact, terms]."""
        count = self.top_k - self.num_exact
        points = np.linspace(0, 1, count, dtype=dtype) if self.normalise else np.arange(count, dtype=dtype)
        return np.stack([np.sqrt(points) if term == "sqrt" else points**term for term in self.terms], axis=1)

    def _fit(self, logprobs_PC: NDArray[np.float32]) -> NDArray[Any]:
        """Return the coefficients [P, terms]. No better solver: the loss of this one is part of the layout."""
        parts = torch.linalg.svd(torch.from_numpy(self._basis(self.fit_dtype)), full_matrices=False)
        left, singular, right = (part.numpy() for part in parts)
        inverse = np.where(singular > 1e-5, 1 / singular, 0).astype(self.fit_dtype)
        return (logprobs_PC.astype(self.fit_dtype) @ left * inverse) @ right


def pack_bits(numbers_PK: IntArray, num_bits: int) -> NDArray[np.uint8]:
    """Pack numbers below 2^``num_bits``, highest bit first, each row into whole bytes: [P, ceil(K num_bits / 8)]."""
    num_positions, top_k = numbers_PK.shape
    packed = np.empty((num_positions, -(-top_k * num_bits // 8)), np.uint8)
    for start in range(0, num_positions, BLOCK_ROWS):
        block = numbers_PK[start : start + BLOCK_ROWS].astype(">u4")
        bits = np.unpackbits(block.view(np.uint8).reshape(len(block), top_k, 4), axis=2)[:, :, -num_bits:]
        packed[start : start + BLOCK_ROWS] = np.packbits(bits.reshape(len(block), -1), axis=1)
    return packed


def unpack_bits(packed: NDArray[np.uint8], num_bits: int, top_k: int) -> NDArray[np.int32]:
    """Return the ``top_k`` numbers of every row that ``pack_bits`` packed, [P, K]."""
    numbers = np.empty((len(packed), top_k), np.int32)
    for start in range(0, len(packed), BLOCK_ROWS):
        block = packed[start : start + BLOCK_ROWS]
        bits = np.zeros((len(block), top_k, 32), np.uint8)
        bits[:, :, -num_bits:] = np.unpackbits(block, axis=1, count=top_k * num_bits).reshape(len(block), top_k, -1)
        numbers[start : start + BLOCK_ROWS] = np.packbits(bits, axis=2).view(">u4")[:, :, 0]
    return numbers


def _bytes_of_rows(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)


# ------------------------------------------------------------------------------------------------------ Megatron-LM


class MegatronPeer(Peer):
    """Megatron-LM offline distillation: float16 log-probabilities, ids in 16 + 1 bits, one zstd stream."""

    top_k: int
    zstd_level: int

    def encode(self, sample: TeacherSample) -> Encoded:
        _check_vocabulary(sample.vocab_size)
        top = sample.first(self.top_k)
        low, high = (top.ids_PK & 0xFFFF).astype("<u2"), top.ids_PK >> 16
        raw = top.logprobs_PK.astype("<f2").tobytes() + low.tobytes() + np.packbits(high.astype(bool)).tobytes()
        payload = [Zstd(self.zstd_level).encode(raw)]
        return Encoded(payload, partial(self._decode, payload, len(low)))

    def _decode(self, payload: list[bytes], num_positions: int) -> PeerRows:
        raw, count = Zstd().decode(payload[0]), num_positions * self.top_k
        probs = np.exp(np.frombuffer(raw, "<f2", count).astype(np.float32))
        low = np.frombuffer(raw, "<u2", count, offset=2 * count).astype(np.int32)
        high = np.unpackbits(np.frombuffer(raw, np.uint8, offset=4 * count), count=count).astype(np.int32)
        shape = (num_positions, self.top_k)
        return PeerRows((low | high << 16).reshape(shape), probs.reshape(shape))


def _check_vocabulary(vocab_size: int) -> None:
    if vocab_size > 1 << ID_BITS:
        raise ConfigError(
            f"this layout holds ids of {ID_BITS} bits, so at most {1 << ID_BITS:,} ids, found a vocabulary of "
            f"{vocab_size:,}: leave it out for this teacher"
        )


# ---------------------------------------------------------------------------------------------- Sparse Logit Sampling


class SampledPeer(Peer):
    """Sparse Logit Sampling: every distinct drawn id once, in 3 bytes with its count; id in the lower 17 bits."""

    zstd_level: int | None = None
    """None stores the entries as they are."""

    def encode(self, sample: TeacherSample) -> Encoded:
        _check_vocabulary(sample.vocab_size)
        num_distinct_P, ids_E, counts_E = count_samples(_checked_samples(sample.samples_PN))
        entries_E = (ids_E | counts_E << ID_BITS).astype("<u4")
        parts = [num_distinct_P.astype(np.uint8).tobytes(), _bytes_of_rows(entries_E)[:, :3].tobytes()]
        payload = parts if self.zstd_level is None else [Zstd(self.zstd_level).encode(part) for part in parts]
        return Encoded(payload, partial(self._decode, payload))

    def _decode(self, payload: list[bytes]) -> PeerRows:
        parts = payload if self.zstd_level is None else [Zstd().decode(part) for part in payload]
        num_distinct_P = np.frombuffer(parts[0], np.uint8)
        entries = np.zeros((len(parts[1]) // 3, 4), np.uint8)
        entries[:, :3] = np.frombuffer(parts[1], np.uint8).reshape(-1, 3)
        entries_E = entries.view("<u4")[:, 0]
        used_PJ = np.arange(num_distinct_P.max()) < num_distinct_P[:, None]
        ids_PJ, counts_PJ = np.zeros(used_PJ.shape, np.int32), np.zeros(used_PJ.shape, np.float32)
        ids_PJ[used_PJ] = entries_E & ((1 << ID_BITS) - 1)
        counts_PJ[used_PJ] = entries_E >> ID_BITS
        return PeerRows(ids_PJ, counts_PJ / counts_PJ.sum(axis=1, keepdims=True))


def count_samples(samples_PN: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Return the number of distinct ids of every row, [P], then all distinct ids and their counts, row by row, [E]."""
    ordered_PN = np.sort(samples_PN, axis=1).astype(np.int64)
    is_new_PN = np.ones(ordered_PN.shape, bool)
    is_new_PN[:, 1:] = ordered_PN[:, 1:] != ordered_PN[:, :-1]
    counts_E = np.diff(np.flatnonzero(is_new_PN), append=is_new_PN.size)
    return is_new_PN.sum(axis=1), ordered_PN[is_new_PN], counts_E


def _checked_samples(samples_PN: IntArray | None) -> IntArray:
    most = (1 << COUNT_BITS) - 1
    if samples_PN is None or samples_PN.ndim != 2 or not 1 <= samples_PN.shape[1] <= most:
        found = "none" if samples_PN is None else f"samples of shape {samples_PN.shape}"
        raise ConfigError(f"this layout stores samples [positions, 1 to {most}] (counts have 7 bits), found {found}")
    return samples_PN


_DISTILLKIT = "DistillKit a61c2e7, README"
_RECOMMENDED: dict[str, Any] = {"top_k": 128, "num_exact": 16, "terms": (0, 1, 2, 3, 4, "sqrt")}
_SAMPLING = "Sparse Logit Sampling, ACL 2025"

#: Every layout that kdcache is compared with, by the name it has in tables.
PEERS: dict[str, Peer] = {
    "distillkit": PolynomialPeer(source=f"{_DISTILLKIT}, recommended", **_RECOMMENDED),
    "distillkit-normalised": PolynomialPeer(
        source=f"{_DISTILLKIT}, recommended with normalize_t", normalise=True, **_RECOMMENDED
    ),
    "distillkit-budget": PolynomialPeer(
        source=f"{_DISTILLKIT}, budget pick", top_k=50, num_exact=1, terms=(0, 1, "sqrt")
    ),
    "megatron": MegatronPeer(source="Megatron-LM offline distillation, k = 64", top_k=64, zstd_level=3),
    "sampling": SampledPeer(source=_SAMPLING),
    "sampling-zstd": SampledPeer(source=f"{_SAMPLING}, then zstd-9", zstd_level=9),
}
