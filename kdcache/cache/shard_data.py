"""A shard on its way to disk: what it holds, its arrays, and what is known about its sequences and itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache.tail_prior import TailSum
from kdcache.errors import CacheError
from kdcache.fields import TARGETS_FIELD, TOKENS_FIELD, FieldKind, TokenRows
from kdcache.schema import NO_LABEL, Statistics, Targets


@dataclass
class ShardData:
    """Everything a shard holds, ready to be encoded; rows in the order of its sequences.

    ``tokens`` are its sequences. ``labels_P`` of them serve the statistics, and are stored where the plan has an array
    for them: a task may derive them from the tokens. ``values`` are the rows of the other fields by name, as
    `FieldKind.stage` returned them (in float32 a shard of hidden states would not fit). ``copied`` are fields that come
    encoded, from another cache, by the names of their arrays. ``table`` is the per-sequence table. ``tail_sum`` is this
    shard's share of the tail prior, if the plan has one.
    """

    index: int
    tokens: TokenRows
    values: dict[str, Any]
    table: pa.Table
    copied: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    tail_sum: TailSum | None = None

    @property
    def num_positions(self) -> int:
        """Number of positions, P."""
        return len(self.tokens.loss_mask_P)

    @property
    def targets(self) -> Targets | None:
        """The targets; None where the teacher gives no distribution."""
        return self.values.get(TARGETS_FIELD)


def encode_field(kind: FieldKind, data: ShardData) -> dict[str, NDArray[Any]]:
    """Return the arrays of a field by their paths; raises ``CacheError`` for other shapes than the plan's."""
    record = kind.record
    if record.name in data.copied:
        values = data.copied[record.name]
    else:
        values = kind.encode(data.tokens if record.name == TOKENS_FIELD else data.values[record.name])
    for array in record.arrays:
        if values[array.name].shape[1:] != array.shape:
            # Written as it is, no reader would open it.
            found = values[array.name].shape[1:]
            raise CacheError(f"field {record.name}, array {array.name}: rows of {found}, the plan says {array.shape}")
    return {array.path: values[array.name].astype(array.dtype, copy=False) for array in record.arrays}


def _per_sequence_sum(values_P: NDArray[Any], data: ShardData) -> NDArray[np.float64]:
    num_positions_N = np.asarray(data.tokens.num_positions_N)
    ends = np.cumsum(num_positions_N)
    # NaN must stay in its own sequence, and a difference of cumulated sums would carry it on.
    is_unknown_P = np.isnan(values_P)
    cumulated = np.concatenate([[0.0], np.cumsum(np.where(is_unknown_P, 0, values_P), dtype=np.float64)])
    result: NDArray[np.float64] = cumulated[ends] - cumulated[ends - num_positions_N]
    if is_unknown_P.any():
        result[np.repeat(np.arange(len(ends)), num_positions_N)[is_unknown_P]] = np.nan
    return result


def with_statistics(data: ShardData) -> pa.Table:
    """Return the per-sequence table with the teacher's mean loss, entropy and kept mass: what curricula sort by.

    What the teacher does not give is left out.
    """
    counts_P = data.tokens.loss_mask_P.astype(bool)
    count_N = _per_sequence_sum(counts_P, data)
    table = data.table.append_column("num_targets", pa.array(count_N.astype(np.int64)))
    targets = data.targets
    if targets is None:
        return table
    columns = {
        "teacher_loss": None if targets.gold_logprob_P is None else -targets.gold_logprob_P,
        "teacher_entropy": targets.entropy_P,
        "kept_mass": -np.expm1(targets.log_tail_P),
    }
    for name, values_P in columns.items():
        if values_P is None:
            continue
        # A sequence without a label in one of its positions has no loss: null.
        mean_N = _per_sequence_sum(np.where(counts_P, values_P, 0), data) / np.maximum(count_N, 1)
        table = table.append_column(name, pa.array(mean_N.astype(np.float32), from_pandas=True))
    return table


def statistics_of(data: ShardData) -> Statistics:
    """Return the sums over the positions of a shard that count; sums of what the teacher does not give are 0."""
    valid = data.tokens.loss_mask_P.astype(bool)
    num_positions, targets = int(valid.sum()), data.targets
    if targets is None:
        return Statistics(num_positions=num_positions, num_unlabelled=num_positions)
    if targets.gold_logprob_P is None:
        labels_P = data.tokens.labels_P
        is_unlabelled_P = np.ones(len(valid), bool) if labels_P is None else np.equal(labels_P, NO_LABEL)
        gold_P = np.zeros(len(valid), np.float32)
    else:
        gold_P, is_unlabelled_P = targets.gold_logprob_P, np.isnan(targets.gold_logprob_P)
    entropy_P = np.zeros(0) if targets.entropy_P is None else targets.entropy_P[valid]
    return Statistics(
        num_positions=num_positions,
        num_unlabelled=int(is_unlabelled_P[valid].sum()),
        teacher_loss_sum=float(-np.nansum(gold_P[valid], dtype=np.float64)),
        entropy_sum=float(entropy_P.sum(dtype=np.float64)),
        kept_mass_sum=float(-np.expm1(targets.log_tail_P[valid].astype(np.float64)).sum()),
        top1_correct=int((targets.top1_ids_P == data.tokens.labels_P)[valid].sum()),
    )
