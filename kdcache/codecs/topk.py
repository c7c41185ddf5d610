"""Codecs of the kept ids: encode ids and log-probabilities as small integers or half-precision numbers.

A codec only turns values into small numbers (gaps on a grid, ranks in a table). Zarr's own codecs turn these numbers
into bytes, so any Zarr reader opens the arrays. In every codec the decoded probabilities and the tail add up to 1: the
quantised probabilities are normalised to one minus the *stored* tail. An exact tail is always stored and never computed
as one minus the kept mass, because rounding the kept mass to half precision can make that negative.

======= ===================================================== ==========================================
codec   log-probabilities                                     use it for
======= ===================================================== ==========================================
compact log-probability gaps on a grid of 1/16 nat, one byte, sharing and training (the default)
        ids as frequency ranks with a table per shard
fp16    float16 log-probabilities                             comparing with other tools
bf16    bfloat16 log-probabilities                            comparing with other tools
exact   float32, every scalar float32                         proofs: decodes to the bit
======= ===================================================== ==========================================

Rows may be ragged: ``kept_PK`` then says which columns of a row are ids and which are padding behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.codecs.checks import check_below, check_finite, check_logprobs
from kdcache.codecs.floats import BF16, FP16, FP32, FloatFormat
from kdcache.codecs.ids import OpenTables, id_dtype, open_table, rank_ids, sorted_steps, undo_sorted_steps
from kdcache.config import Config
from kdcache.plugins import Table
from kdcache.schema import ArrayRecord

Arrays = Mapping[str, NDArray[Any]]
Kept = NDArray[np.bool_] | None

#: exp(-2048) is 0 in float32, so nothing below it can matter; keeps grid arithmetic in range where a logit is -inf.
_FLOOR = -2048.0
#: Rows that are decoded at once: large enough that numpy's calls cost nothing, small enough for the processor's cache.
_BLOCK = 8192


class TopKCodec(Config):
    """Base class; ``scalar_dtype`` is the dtype of a position's scalars, such as its entropy."""

    name: str
    scalar_dtype: Literal["float16", "float32"] = "float16"
    id_tables: ClassVar[tuple[str, ...]] = ()
    """Tables that `decode` also accepts as `OpenTables`, to decode positions of several shards at once."""
    stores_logprobs: ClassVar[bool] = False
    """Whether the kept mass can be computed without the tail, see `log_remainder`."""

    @property
    def kl_bound(self) -> float:
        """Upper bound of the mean KL from original to decoded, in nats, from real teachers; `verify` allows it."""
        raise NotImplementedError

    def encode(
        self, ids_PK: NDArray[Any], logprobs_PK: NDArray[np.float32], vocab_size: int, kept_PK: Kept = None
    ) -> dict[str, NDArray[Any]]:
        """Encode P rows; ids must be below ``vocab_size`` and log-probabilities must not increase along K."""
        raise NotImplementedError

    def check(self, arrays: Arrays, vocab_size: int) -> None:
        """Raise ``CorruptCacheError`` unless all rows of a shard decode to ids below ``vocab_size`` and to numbers.

        What decoding itself finds need not be checked.
        """

    def decode(
        self, arrays: Arrays, log_tail_P: NDArray[np.float32], kept_PK: Kept = None
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Return ids and log-probabilities of positions with the tail mass exp(``log_tail_P``).

        ``arrays`` may hold any slice of the positions, but must hold every table as a whole. Contiguous columns decode
        fastest.
        """
        raise NotImplementedError

    def log_remainder(self, arrays: Arrays, kept_PK: Kept = None) -> NDArray[np.float32]:
        """Return the log of one minus the kept mass, [P]; -inf where nothing remains."""
        raise NotImplementedError

    def arrays(self, top_k: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
        """Describe the arrays that `encode` returns."""
        raise NotImplementedError

    def normalise(
        self, logprobs_KP: NDArray[np.float32], log_tail_P: NDArray[np.float32], kept_KP: Kept
    ) -> NDArray[np.float32]:
        """Scale the kept probabilities to the mass 1 - tail, in place, and set padding to -inf."""
        exp_KP = np.exp(logprobs_KP)
        if kept_KP is not None:
            exp_KP *= kept_KP
        # The kept ids always have some mass, but half precision can round a tail of 0.9999999 up to 1.
        tail_P = np.minimum(np.exp(log_tail_P), np.float32(1 - 2**-23))
        logprobs_KP += np.log1p(-tail_P) - np.log(_sum_columns(exp_KP))
        if kept_KP is not None:
            logprobs_KP[~kept_KP] = -np.inf
        return logprobs_KP


class CompactCodec(TopKCodec):
    """Gaps between neighbouring ranks on a log grid, one byte each; ids as frequency ranks of the shard.

    The *cumulated* gap is rounded to ``1 / grid`` nat, so errors do not add up along K: every kept log-probability is
    off by at most ``0.5 / grid`` before normalisation, at any temperature. A step of more than 255 / grid nats
    (15.9 by default: a factor of 8 million) is stored as 255. Ids on the same grid point lose their order, except that
    the most probable id stays the first. They are sorted by frequency rank instead, which saves 3 bytes per position.
    """

    name: Literal["compact"] = "compact"
    grid: int = Field(default=16, ge=1, le=64)
    id_tables: ClassVar[tuple[str, ...]] = ("id_table",)

    @property
    def kl_bound(self) -> float:
        return 5e-4 * (16 / self.grid) ** 2  # rounding costs the square of its step; measured 9e-5 at 16

    def encode(
        self, ids_PK: NDArray[Any], logprobs_PK: NDArray[np.float32], vocab_size: int, kept_PK: Kept = None
    ) -> dict[str, NDArray[Any]]:
        below_top_PK = logprobs_PK[:, :1] - np.maximum(logprobs_PK, np.float32(_FLOOR))
        codes_PK = np.rint(below_top_PK * np.float32(self.grid)).astype(np.int64)
        # Cumulated after clipping: ids are sorted by the gaps that a reader will decode.
        gaps_PK = np.minimum(np.diff(codes_PK, axis=1, prepend=0), 255)
        codes_PK = np.cumsum(gaps_PK, axis=1)
        if kept_PK is not None:
            codes_PK[~kept_PK] = 1 << 30  # padding stays behind
        ranks_V, table = rank_ids(ids_PK if kept_PK is None else ids_PK[kept_PK], vocab_size)
        # One number that sorts by grid point, then by rank, and leaves the first column alone.
        keys_PK = (codes_PK << 32) | ranks_V[ids_PK]
        keys_PK[:, 1:].sort(axis=1)
        ranks_PK = (keys_PK & 0xFFFFFFFF).astype(table.dtype)
        return {
            "topk_ranks": sorted_steps(ranks_PK, _ties(gaps_PK)),
            "topk_gaps": gaps_PK.astype(np.uint8),
            "id_table": table,
        }

    def check(self, arrays: Arrays, vocab_size: int) -> None:
        check_below(open_table(arrays["id_table"]), vocab_size, "id_table", "the number of ids")

    def decode(
        self, arrays: Arrays, log_tail_P: NDArray[np.float32], kept_PK: Kept = None
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        gaps_KP, steps_KP = arrays["topk_gaps"].T, arrays["topk_ranks"].T
        tables = OpenTables.of(arrays["id_table"], steps_KP.shape[1])
        ids_KP = np.empty(steps_KP.shape, dtype=tables.dtype)
        logprobs_KP = np.empty(steps_KP.shape, dtype=np.float32)
        for block in _blocks(gaps_KP.shape[1]):
            kept_KP = None if kept_PK is None else kept_PK.T[:, block]
            gaps_KB = gaps_KP[:, block]
            _cumulate(gaps_KB, logprobs_KP[:, block], np.float32(-1 / self.grid))
            self.normalise(logprobs_KP[:, block], log_tail_P[block], kept_KP)
            ranks_KB = undo_sorted_steps(steps_KP[:, block], _ties(gaps_KB.T).T)
            if kept_KP is not None:  # the steps of padding are zeros that mean nothing
                ranks_KB = np.where(kept_KP, ranks_KB, ranks_KB[:1])
            tables.write_ids(ranks_KB, block.start, ids_KP[:, block], "id_table")
        return ids_KP.T, logprobs_KP.T

    def arrays(self, top_k: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
        return (
            ArrayRecord(name="topk_ranks", dtype=id_dtype(vocab_size), rows="positions", shape=(top_k,)),
            ArrayRecord(name="topk_gaps", dtype="uint8", rows="positions", shape=(top_k,)),
            ArrayRecord(name="id_table", dtype=id_dtype(vocab_size), rows="table"),
        )


def _ties(gaps_PK: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which columns are on the grid point of the column before; the first two columns never are."""
    same_PK = gaps_PK == 0
    same_PK[:, :2] = False  # the first column is not sorted, so the second is stored as it is
    return same_PK


def _cumulate(gaps_KP: NDArray[Any], out_KP: NDArray[np.float32], unit: np.float32) -> None:
    """Write ``unit`` times the sums of ``gaps_KP`` over the columns so far to ``out_KP``."""
    # A loop over K adds whole columns, 12 times as fast as np.cumsum along an axis; sums are whole numbers, so exact.
    previous_P: Any = np.float32(0)
    for k in range(len(gaps_KP)):
        np.add(previous_P, gaps_KP[k], out=out_KP[k])
        previous_P = out_KP[k]
    out_KP *= unit


def _sum_columns(values_KP: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sums over the columns, [P], always added in the same order."""
    # np.sum adds a single row in another order than many rows: a position read alone would decode to other bits.
    total_P = values_KP[0].copy()
    for values_P in values_KP[1:]:
        total_P += values_P
    return total_P


def _blocks(num_positions: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, num_positions, _BLOCK))


class _LogprobCodec(TopKCodec):
    """Base of the codecs that store ids as they are and one log-probability each, in the subclass's float format."""

    stores_logprobs: ClassVar[bool] = True
    _format: ClassVar[FloatFormat]
    _kl_bound: ClassVar[float]

    @property
    def kl_bound(self) -> float:
        return self._kl_bound

    def encode(
        self, ids_PK: NDArray[Any], logprobs_PK: NDArray[np.float32], vocab_size: int, kept_PK: Kept = None
    ) -> dict[str, NDArray[Any]]:
        return {"topk_ids": ids_PK.astype(id_dtype(vocab_size)), "topk_logprobs": self._format.pack(logprobs_PK)}

    def check(self, arrays: Arrays, vocab_size: int) -> None:
        check_below(arrays["topk_ids"], vocab_size, "topk_ids", "the number of ids")
        logprobs_PK = arrays["topk_logprobs"]
        check_logprobs(logprobs_PK, self._format, "topk_logprobs")
        check_finite(logprobs_PK[:, :1], self._format, "topk_logprobs")  # else a row has no mass at all

    def decode(
        self, arrays: Arrays, log_tail_P: NDArray[np.float32], kept_PK: Kept = None
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        ids_PK = arrays["topk_ids"]
        if kept_PK is not None:
            ids_PK = np.where(kept_PK, ids_PK, ids_PK[:, :1])
        # A copy in any case: the encoded arrays may be read-only, and they are read again.
        logprobs_KP = np.array(self._format.unpack(arrays["topk_logprobs"]).T, order="C")
        return ids_PK, self.normalise(logprobs_KP, log_tail_P, None if kept_PK is None else kept_PK.T).T

    def log_remainder(self, arrays: Arrays, kept_PK: Kept = None) -> NDArray[np.float32]:
        exp_KP = np.exp(np.array(self._format.unpack(arrays["topk_logprobs"]).T, order="C"))
        if kept_PK is not None:
            exp_KP *= kept_PK.T
        with np.errstate(divide="ignore"):
            log_tail_P: NDArray[np.float32] = np.log(np.maximum(1 - _sum_columns(exp_KP), 0))
        return log_tail_P

    def arrays(self, top_k: int, vocab_size: int) -> tuple[ArrayRecord, ...]:
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

    def normalise(
        self, logprobs_KP: NDArray[np.float32], log_tail_P: NDArray[np.float32], kept_KP: Kept
    ) -> NDArray[np.float32]:
        if kept_KP is not None:
            logprobs_KP[~kept_KP] = -np.inf
        return logprobs_KP


#: Every codec of kept ids by its name on the command line.
TOPK_CODECS: Table[type[TopKCodec]] = Table(
    "codec",
    "kdcache.topk_codecs",
    {"compact": CompactCodec, "bf16": Bf16Codec, "fp16": Fp16Codec, "exact": ExactCodec},
)
