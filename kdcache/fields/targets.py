"""The teacher's targets: kept ids, samples, tails and scalars of every position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codecs import TargetsCodec, targets_codec
from kdcache.codecs.checks import ROUNDING
from kdcache.fields.base import Arrays, FieldKind, lists
from kdcache.schema import NO_LABEL, ArrayRecord, FieldRecord, Plan, Samples, SequenceBatch, Targets, TargetsRecord

TARGETS_FIELD = "targets"


class TargetsField(FieldKind):
    """Distributions of the teacher; `Targets` in memory. Caches of the kind outputs do not have it."""

    is_always_read: ClassVar[bool] = True

    def __init__(self, record: FieldRecord, plan: Plan) -> None:
        super().__init__(record, plan)
        self.codec: TargetsCodec = targets_codec(record.codec, plan.targets, plan.num_ids)
        self.id_tables = self.codec.id_tables
        tokens = (array for field in plan.fields if field.name == "tokens" for array in field.arrays)
        self._lacks_labels = any(array.name == "labels" and array.dtype == "int32" for array in tokens)
        """Whether rows may lack a label; where labels are not stored, they are tokens."""

    def arrays(self) -> tuple[ArrayRecord, ...]:
        return self.codec.arrays()

    @classmethod
    def most_rows(cls, plan: Plan, num_positions: int) -> dict[str, int]:
        return {
            "entries": num_positions * plan.targets.top_k,
            "samples": num_positions * min(plan.targets.num_samples, plan.num_ids),
        }

    def allocate(self, staged: Targets, num_rows: int) -> Targets:
        def room(array: Any) -> Any:
            return None if array is None else np.zeros((num_rows, *array.shape[1:]), array.dtype)

        values = {name: room(value) for name, value in vars(staged).items() if name != "samples"}
        if staged.samples is None:
            return Targets(**values)
        shape = (num_rows, self.plan.targets.num_samples)
        ids_PJ, counts_PJ = staged.samples.ids_PJ, staged.samples.counts_PJ
        return Targets(**values, samples=Samples(np.zeros(shape, ids_PJ.dtype), np.zeros(shape, counts_PJ.dtype)))

    def put(self, room: Targets, rows: NDArray[np.int64] | slice, staged: Targets) -> None:
        for name, values in vars(staged).items():
            if name != "samples" and values is not None:
                getattr(room, name)[rows] = values
        if staged.samples is not None and room.samples is not None:
            for name, values in vars(staged.samples).items():
                getattr(room.samples, name)[rows, : values.shape[1]] = values

    def encode(self, staged: Targets) -> dict[str, NDArray[Any]]:
        return self.codec.encode(staged)

    def open(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        opened = self.codec.open(arrays)
        self.codec.check(opened, all_labelled=not self._lacks_labels)
        return opened

    def opened_bytes(self, num_rows: Mapping[str, int]) -> int:
        return super().opened_bytes(num_rows) + self.codec.opened_bytes(num_rows)

    def decode(self, arrays: Mapping[str, Any]) -> Targets:
        return self.codec.decode(arrays)

    @classmethod
    def concatenate(cls, values: Sequence[Targets]) -> Targets:
        return Targets.concatenate(list(values))

    def check(self, batch: SequenceBatch) -> Iterator[str]:
        targets = batch.targets
        yield from _check_distribution(targets, self.plan.num_ids)
        yield from _check_samples(targets, self.plan.targets)
        if targets.entropy_P is not None and not (np.isfinite(targets.entropy_P) & (targets.entropy_P > -1e-3)).all():
            yield "entropy holds values below 0 or not finite"
        if targets.gold_logprob_P is not None:
            yield from _check_gold(targets.gold_logprob_P, batch.labels_P)

    @classmethod
    def collate(cls, name: str, batch: SequenceBatch) -> dict[str, NDArray[Any]]:
        targets = batch.targets
        ids_PK, logprobs_PK, log_tail_P = targets.merged()
        found: dict[str, NDArray[Any] | None] = {
            "teacher_ids": ids_PK.astype(np.int64),
            "teacher_logprobs": logprobs_PK,
            "teacher_log_tail": log_tail_P,
            "teacher_gold_logprob": targets.gold_logprob_P,
            "teacher_entropy": targets.entropy_P,
            "teacher_log_tails": targets.log_tails_PG,
        }
        return {name: array for name, array in found.items() if array is not None}

    def columns(self, name: str, batch: SequenceBatch) -> dict[str, pa.Array]:
        targets = batch.targets
        found: dict[str, Any] = {"num_kept": targets.num_kept_P}
        if targets.top_k:  # where all is sampled, no ids are kept
            found |= {"ids": targets.ids_PK.astype(np.int32), "logprobs": targets.logprobs_PK}
        found["log_tails"] = targets.log_tails_PG
        if targets.top_k or targets.samples is not None:
            found |= {
                "log_tail": targets.log_tail_P,
                "gold_logprob": targets.gold_logprob_P,
                "entropy": targets.entropy_P,
            }
        if targets.samples is not None:
            found |= _sample_columns(targets.samples)
        return {name: lists(values, batch.position_offsets_N1) for name, values in found.items() if values is not None}


def _sample_columns(samples: Samples) -> dict[str, pa.Array]:
    """Return the samples of every position, without their padding."""
    is_sampled_PJ = samples.counts_PJ > 0
    offsets_P1 = np.concatenate([[0], np.cumsum(is_sampled_PJ.sum(axis=1))])
    named = {"sample_ids": samples.ids_PJ, "sample_counts": samples.counts_PJ}
    return {name: lists(values[is_sampled_PJ].astype(np.int32), offsets_P1) for name, values in named.items()}


def _check_distribution(targets: Targets, num_ids: int) -> Iterator[str]:
    ids, logprobs, log_tail = targets.merged()
    if int(ids.max(initial=0)) >= num_ids:
        yield f"kept id {int(ids.max())} is outside the vocabulary of {num_ids}"
    # Padding repeats an id; numbers that no id has tell its entries apart.
    ordered = np.sort(np.where(np.isneginf(logprobs), num_ids + np.arange(ids.shape[1]), ids.astype(np.int64)), axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        yield "a row keeps the same id twice"
    if not (targets.logprobs_PK[:, 1:] <= targets.logprobs_PK[:, :-1]).all():
        yield "log-probabilities increase along a row"
    tails = targets.log_tail_P if targets.log_tails_PG is None else targets.log_tails_PG
    for name, values in (("logprobs", logprobs), ("log_tail", targets.log_tail_P), ("log_tails", tails)):
        if np.isnan(values).any() or (values > ROUNDING).any():
            yield f"{name} holds values that are not log-probabilities"
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1) + np.exp(log_tail.astype(np.float64))
    if not (np.abs(mass - 1) < ROUNDING).all():
        yield f"kept mass and tail add up to {mass[np.argmax(np.abs(mass - 1))]:.6f} in a row, not to 1"


def _check_samples(targets: Targets, record: TargetsRecord) -> Iterator[str]:
    if targets.num_kept_P is not None and int(targets.num_kept_P.min(initial=1)) < 1:
        yield "a row keeps no id"
    if targets.samples is None:
        return
    num_P = targets.samples.counts_PJ.sum(axis=1, dtype=np.int64)
    # Where everything is kept there is nothing to sample from.
    wrong_P = (num_P != record.num_samples) & ~((num_P == 0) & np.isneginf(targets.log_tail_P))
    if wrong_P.any():
        yield f"a row has {int(num_P[np.argmax(wrong_P)])} samples, the plan says {record.num_samples}"


def _check_gold(gold_P: NDArray[np.float32], labels_P: NDArray[Any] | None) -> Iterator[str]:
    """Check the log-probabilities of the gold labels: NaN exactly where there is no label."""
    is_known_P = np.ones(len(gold_P), bool)
    if labels_P is not None and labels_P.dtype.kind == "i":
        is_known_P = labels_P != NO_LABEL
    good_P = np.where(is_known_P, np.isfinite(gold_P) & (gold_P < ROUNDING), np.isnan(gold_P))
    if not good_P.all():
        yield "gold_logprob holds values that are not log-probabilities"


def targets_field(codec: TargetsCodec) -> FieldRecord:
    """Describe the field of the targets that ``codec`` stores."""
    return FieldRecord(name=TARGETS_FIELD, kind="targets", codec=codec.topk.model_dump(), arrays=codec.arrays())
