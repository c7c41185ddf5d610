"""A shard on its way to disk: what it holds, its arrays, and what is known about its sequences and itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.tail_prior import TailSum
from kdcache.codecs import targets_codec, vector_codec
from kdcache.errors import CacheError
from kdcache.schema import FieldRecord, Plan, Statistics, Targets


@dataclass
class ShardData:
    """Everything a shard holds, ready to be encoded; rows in the order of its sequences.

    ``labels_P`` are the corpus's own answers at the rows, as the task aligned them; they serve the statistics, and are
    stored where the plan has an array for them: a task may derive them from the tokens. ``hidden`` maps field names to
    vectors as their codec's ``stage`` returned them: in float32 a shard of them would not fit. ``copied`` are fields
    that come encoded, from another cache, by the names of their arrays. ``table`` is the per-sequence table.
    ``tail_sum`` is this shard's share of the tail prior, if the plan has one.
    """

    index: int
    tokens_T: NDArray[np.uint32]
    num_tokens_N: NDArray[np.int64]
    num_positions_N: NDArray[np.int64]
    loss_mask_P: NDArray[np.uint8]
    labels_P: NDArray[Any]
    targets: Targets
    table: pa.Table
    segment_ids_T: NDArray[np.uint16] | None = None
    token_index_P: NDArray[np.uint32] | None = None
    hidden: dict[str, NDArray[Any]] = field(default_factory=dict)
    copied: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    tail_sum: TailSum | None = None


def encode_field(record: FieldRecord, data: ShardData, plan: Plan) -> dict[str, NDArray[Any]]:
    """Return the arrays of a field by their paths; raises ``CacheError`` for other shapes than the plan's."""
    if record.name in data.copied:
        values = data.copied[record.name]
    elif record.name != layout.TARGETS_FIELD:
        values = vector_codec(record.codec).encode(data.hidden[record.name])
    else:
        values = {
            "tokens": data.tokens_T,
            "loss_mask": data.loss_mask_P,
            "num_tokens": data.num_tokens_N,
            "num_positions": data.num_positions_N,
            "labels": data.labels_P,
            **targets_codec(record.codec, plan.targets, plan.num_ids).encode(data.targets),
        }
        optional = {"segment_ids": data.segment_ids_T, "token_index": data.token_index_P}
        values |= {name: array for name, array in optional.items() if array is not None}
    for array in record.arrays:
        if values[array.name].shape[1:] != array.shape:
            # Written as it is, no reader would open it.
            found = values[array.name].shape[1:]
            raise CacheError(f"field {record.name}, array {array.name}: rows of {found}, the plan says {array.shape}")
    return {array.path: values[array.name].astype(array.dtype, copy=False) for array in record.arrays}


def _per_sequence_sum(values_P: NDArray[Any], data: ShardData) -> NDArray[np.float64]:
    ends = np.cumsum(data.num_positions_N)
    # NaN must stay in its own sequence, and a difference of cumulated sums would carry it on.
    is_unknown_P = np.isnan(values_P)
    cumulated = np.concatenate([[0.0], np.cumsum(np.where(is_unknown_P, 0, values_P), dtype=np.float64)])
    result: NDArray[np.float64] = cumulated[ends] - cumulated[ends - data.num_positions_N]
    if is_unknown_P.any():
        result[np.repeat(np.arange(len(ends)), data.num_positions_N)[is_unknown_P]] = np.nan
    return result


def with_statistics(data: ShardData, gives_distributions: bool = True) -> pa.Table:
    """Return the per-sequence table with the teacher's mean loss, entropy and kept mass: what curricula sort by.

    They are left out where the teacher gives no distribution.
    """
    counts_P = data.loss_mask_P.astype(bool)
    count_N = _per_sequence_sum(counts_P, data)
    table = data.table.append_column("num_targets", pa.array(count_N.astype(np.int64)))
    if not gives_distributions:
        return table
    columns = {
        "teacher_loss": -data.targets.gold_logprob_P,
        "teacher_entropy": data.targets.entropy_P,
        "kept_mass": -np.expm1(data.targets.log_tail_P),
    }
    for name, values_P in columns.items():
        # A sequence without an answer of the corpus in one of its rows has no loss: null.
        mean_N = _per_sequence_sum(np.where(counts_P, values_P, 0), data) / np.maximum(count_N, 1)
        table = table.append_column(name, pa.array(mean_N.astype(np.float32), from_pandas=True))
    return table


def statistics_of(data: ShardData) -> Statistics:
    """Return the sums over the positions of a shard that count."""
    valid = data.loss_mask_P.astype(bool)
    targets = data.targets
    if not targets.top_k and targets.samples is None:
        return Statistics(num_positions=int(valid.sum()), num_unlabelled=int(valid.sum()))
    return Statistics(
        num_positions=int(valid.sum()),
        num_unlabelled=int(np.isnan(targets.gold_logprob_P[valid]).sum()),
        teacher_loss_sum=float(-np.nansum(targets.gold_logprob_P[valid], dtype=np.float64)),
        entropy_sum=float(targets.entropy_P[valid].sum(dtype=np.float64)),
        kept_mass_sum=float(-np.expm1(targets.log_tail_P[valid].astype(np.float64)).sum()),
        top1_correct=int((targets.top1_ids_P == data.labels_P)[valid].sum()),
    )
