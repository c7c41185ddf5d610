"""The codec of a cache's targets: kept ids, scalars, tails at other temperatures, and samples.

The kept ids are stored by one of `TOPK_CODECS`; a ragged cache stores their arrays without padding. Reading has two
steps: `TargetsCodec.open` turns the arrays of a shard into rectangles once, `TargetsCodec.decode` takes any rows of
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs.checks import ROUNDING, check_below, check_logprobs, check_rows
from kdcache.codecs.floats import format_of
from kdcache.codecs.ids import open_table
from kdcache.codecs.ragged import expand, flatten
from kdcache.codecs.samples import count_dtype, decode_samples, encode_samples, open_samples, sample_arrays
from kdcache.codecs.topk import TopKCodec
from kdcache.errors import CacheError, ConfigError
from kdcache.schema import SCALARS, ArrayRecord, Targets, TargetsRecord

Arrays = Mapping[str, NDArray[Any]]


class TargetsCodec:
    """Encodes and decodes `Targets` of the kind that ``record`` describes, over ``vocab_size`` ids."""

    def __init__(self, topk: TopKCodec, record: TargetsRecord, vocab_size: int) -> None:
        self.topk = topk
        self.record = record
        self.vocab_size = vocab_size
        self._topk_arrays = topk.arrays(record.top_k, vocab_size) if record.top_k else ()
        self._ragged = [a.name for a in self._topk_arrays if record.is_ragged and a.rows == "positions"]
        self._scalars = tuple(name for name in SCALARS if name in record.scalars)
        self._computes_tail = record.top_k > 0 and "log_tail" not in self._scalars
        if self._computes_tail and record.probabilities == "vocabulary":
            if record.tail == "exact":
                raise ConfigError(
                    "the plan stores no log_tail; add it to targets.scalars, or set targets.tail=remainder"
                )
            if not topk.stores_logprobs:
                raise ConfigError(
                    f"codec {topk.name} needs the scalar log_tail; add it to targets.scalars, or use the codec fp16, "
                    "bf16 or exact"
                )
        self.id_tables = (*(topk.id_tables if record.top_k else ()), *(("sample_table",) if record.num_samples else ()))
        """Tables that `decode` also takes as `OpenTables`."""

    def arrays(self) -> tuple[ArrayRecord, ...]:
        """Describe the arrays that `encode` returns."""
        record, scalar = self.record, self.topk.scalar_dtype
        found = [
            array.model_copy(update={"rows": "entries", "shape": ()}) if array.name in self._ragged else array
            for array in self._topk_arrays
        ]
        found += [ArrayRecord(name=name, dtype=scalar, rows="positions") for name in self._scalars]
        if record.is_ragged:
            found.append(ArrayRecord(name="num_kept", dtype=count_dtype(record.top_k), rows="positions"))
        if record.temperatures:
            shape = (len(record.temperatures),)
            found.append(ArrayRecord(name="log_tails", dtype=scalar, rows="positions", shape=shape))
        if record.num_samples:
            found += sample_arrays(record.num_samples, self.vocab_size)
        return tuple(found)

    def encode(self, targets: Targets) -> dict[str, NDArray[Any]]:
        """Encode P rows; ids must be below V and log-probabilities must not increase along K."""
        scalar = self.topk.scalar_dtype
        values = {"log_tail": targets.log_tail_P, "gold_logprob": targets.gold_logprob_P, "entropy": targets.entropy_P}
        encoded: dict[str, NDArray[Any]] = {
            name: np.asarray(_required(values[name], name)).astype(scalar) for name in self._scalars
        }
        if self.record.top_k:
            encoded |= self._encode_topk(targets)
        if self.record.temperatures:
            encoded["log_tails"] = _required(targets.log_tails_PG, "log_tails").astype(scalar)
        if self.record.num_samples:
            encoded |= encode_samples(_required(targets.samples, "samples"), self.record.num_samples, self.vocab_size)
        return encoded

    def _encode_topk(self, targets: Targets) -> dict[str, NDArray[Any]]:
        if not self.record.is_ragged:
            return self.topk.encode(targets.ids_PK, targets.logprobs_PK, self.vocab_size)
        num_P = _required(targets.num_kept_P, "num_kept")
        encoded = self.topk.encode(
            targets.ids_PK, targets.logprobs_PK, self.vocab_size, _kept(num_P, self.record.top_k)
        )
        flat = {name: flatten(encoded[name], num_P) for name in self._ragged}
        return {**encoded, **flat, "num_kept": num_P.astype(count_dtype(self.record.top_k))}

    def open(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return the arrays of a shard with one row per position, still encoded; raises ``CorruptCacheError``."""
        opened = dict(arrays)
        for name in self._ragged:
            opened[name] = expand(arrays[name], arrays["num_kept"], self.record.top_k, name)
        # A row has at most as many distinct samples as there are ids, whatever an untrusted file claims.
        most = min(self.record.num_samples, self.vocab_size)
        return open_samples(opened, most) if self.record.num_samples else opened

    def opened_bytes(self, num_rows: Mapping[str, int]) -> int:
        """Return the bytes of the rectangles that `open` makes of rows without padding."""
        entries = [np.dtype(array.dtype).itemsize for array in self._topk_arrays if array.name in self._ragged]
        widths = [self.record.top_k * itemsize for itemsize in entries]
        if self.record.num_samples:
            most = min(self.record.num_samples, self.vocab_size)
            arrays = (array for array in sample_arrays(self.record.num_samples, self.vocab_size))
            widths += [most * np.dtype(array.dtype).itemsize for array in arrays if array.rows == "samples"]
        return num_rows.get("positions", 0) * sum(widths)

    def check(self, arrays: Arrays, *, all_labelled: bool) -> None:
        """Raise ``CorruptCacheError`` unless what `open` returned decodes to ids below V and to log-probabilities.

        With ``all_labelled`` every row has a label. Whether ids are distinct and masses add up to 1 is left to
        ``verify --deep``, which costs far more.
        """
        stored = format_of(self.topk.scalar_dtype)
        if self.record.is_ragged:
            num_P = arrays["num_kept"]
            check_rows(num_P < 1, num_P, "num_kept", "ids are kept, expected at least 1")
        if self.record.top_k:
            self.topk.check(arrays, self.vocab_size)
        for name in ({"log_tail", "gold_logprob"} & set(self._scalars)) | ({"log_tails"} & arrays.keys()):
            check_logprobs(arrays[name], stored, name, may_be_nan=name == "gold_logprob" and not all_labelled)
        if "entropy" in self._scalars:
            entropy_P = stored.unpack(arrays["entropy"])
            wrong_P = ~(np.isfinite(entropy_P) & (entropy_P > -ROUNDING))
            check_rows(wrong_P, entropy_P, "entropy", "is no entropy")
        if self.record.num_samples:
            check_below(open_table(arrays["sample_table"]), self.vocab_size, "sample_table", "the number of ids")
            num_P = arrays["sample_counts"].sum(axis=1, dtype=np.int64)
            wrong_P = (num_P != self.record.num_samples) & (arrays["num_sampled"] > 0)
            check_rows(wrong_P, num_P, "sample_counts", f"samples, the plan says {self.record.num_samples}")

    def decode(self, arrays: Arrays) -> Targets:
        """Decode rows of what `open` returned: any slice of the per-position arrays, with the whole of every table.

        Rows of several shards together need `OpenTables` in place of the tables in ``id_tables``, and no others.
        """
        scalars = {f"{name}_P": arrays[name].astype(np.float32) for name in self._scalars}
        num_kept_P = arrays["num_kept"] if self.record.is_ragged else None
        samples = decode_samples(arrays) if self.record.num_samples else None
        if self.record.top_k:
            kept_PK = None if num_kept_P is None else _kept(num_kept_P, self.record.top_k)
            log_tail_P = self._remainder(arrays, kept_PK) if self._computes_tail else scalars.pop("log_tail_P")
            ids_PK, logprobs_PK = self.topk.decode(arrays, log_tail_P, kept_PK)
        else:
            num_positions = len(arrays["num_sampled"])
            ids_PK, logprobs_PK = np.zeros((num_positions, 0), np.int32), np.zeros((num_positions, 0), np.float32)
            log_tail_P = np.zeros(num_positions, np.float32)
        return Targets(
            ids_PK=ids_PK,
            logprobs_PK=logprobs_PK,
            log_tail_P=log_tail_P,
            **scalars,
            num_kept_P=num_kept_P,
            log_tails_PG=arrays["log_tails"].astype(np.float32) if self.record.temperatures else None,
            samples=samples,
        )

    def _remainder(self, arrays: Arrays, kept_PK: NDArray[np.bool_] | None) -> NDArray[np.float32]:
        """Return the log tail [P] of rows that do not store it."""
        if self.record.probabilities == "kept":
            num_positions = next(len(arrays[a.name]) for a in self._topk_arrays if a.rows == "positions")
            return np.full(num_positions, -np.inf, np.float32)
        return self.topk.log_remainder(arrays, kept_PK)


def _kept(num_P: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Return which of the ``width`` columns hold ids, [P, K] in Fortran order."""
    mask: NDArray[np.bool_] = (np.arange(width)[:, None] < num_P).T
    return mask


def _required(value: Any, name: str) -> Any:
    if value is None:
        raise CacheError(f"the plan stores {name}, but the targets have none")
    return value
