"""The field that every cache has: tokens, lengths, loss mask, and what else a task stores of its sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codecs import id_dtype
from kdcache.codecs.checks import check_below, check_rows
from kdcache.fields.base import Arrays, FieldKind, lists
from kdcache.fields.rows import check_sequences
from kdcache.schema import NO_LABEL, ArrayRecord, FieldRecord, Plan, SequenceBatch
from kdcache.schema import Sequence as TokenSequence

TOKENS_FIELD = "tokens"

#: Arrays that a task may store of its sequences, see `Sequence`.
SEGMENT_IDS = ArrayRecord(name="segment_ids", dtype="uint16", rows="tokens")
TOKEN_INDEX = ArrayRecord(name="token_index", dtype="uint32", rows="positions")
CLASS_LABELS = ArrayRecord(name="labels", dtype="int32", rows="positions")
NUMBER_LABELS = ArrayRecord(name="labels", dtype="float32", rows="positions")
_OPTIONAL = (SEGMENT_IDS, TOKEN_INDEX, CLASS_LABELS, NUMBER_LABELS)


@dataclass
class TokenRows:
    """Some sequences without the teacher: what `Sequence` holds, flat.

    ``num_tokens_N`` and ``num_positions_N`` are only needed for writing.
    """

    tokens_T: NDArray[np.uint32]
    loss_mask_P: NDArray[np.uint8]
    num_tokens_N: NDArray[np.int64] | None = None
    num_positions_N: NDArray[np.int64] | None = None
    segment_ids_T: NDArray[np.uint16] | None = None
    labels_P: NDArray[Any] | None = None
    token_index_P: NDArray[np.uint32] | None = None

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence], labels_P: NDArray[Any]) -> TokenRows:
        """Return the rows of ``sequences``; ``labels_P`` are those that their task stores."""

        def joined(arrays: list[NDArray[Any] | None]) -> NDArray[Any] | None:
            there = [array for array in arrays if array is not None]
            return np.concatenate(there) if there else None

        return cls(
            tokens_T=np.concatenate([s.tokens_T for s in sequences]),
            loss_mask_P=np.concatenate([s.loss_mask_L for s in sequences]),
            num_tokens_N=np.array([len(s.tokens_T) for s in sequences], dtype=np.int64),
            num_positions_N=np.array([s.num_positions for s in sequences], dtype=np.int64),
            segment_ids_T=joined([s.segment_ids_T for s in sequences]),
            labels_P=labels_P,
            token_index_P=joined([s.token_index_L for s in sequences]),
        )


class TokensField(FieldKind):
    """Tokens, lengths and loss mask; segment ids, labels and token indices where the task has them."""

    is_always_read: ClassVar[bool] = True

    def __init__(self, record: FieldRecord, plan: Plan) -> None:
        super().__init__(record, plan)
        self._names = {array.name for array in record.arrays}

    def arrays(self) -> tuple[ArrayRecord, ...]:
        found = [array for array in self.record.arrays if array in _OPTIONAL]
        return tokens_field(self.plan.tokenizer.vocab_size, found).arrays

    def encode(self, staged: TokenRows) -> dict[str, NDArray[Any]]:
        values: dict[str, NDArray[Any] | None] = {
            "tokens": staged.tokens_T,
            "loss_mask": staged.loss_mask_P,
            "num_tokens": staged.num_tokens_N,
            "num_positions": staged.num_positions_N,
            "segment_ids": staged.segment_ids_T,
            "labels": staged.labels_P,
            "token_index": staged.token_index_P,
        }
        return {name: array for name, array in values.items() if array is not None}

    def open(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return the arrays of a shard and the starts of its sequences, ``token_offsets`` and ``position_offsets``."""
        offsets = {
            f"{axis}_offsets": np.concatenate([[0], np.cumsum(arrays[f"num_{axis}s"], dtype=np.int64)])
            for axis in ("token", "position")
        }
        opened = {**arrays, **offsets}
        self._check(opened)
        return opened

    def _check(self, arrays: Arrays) -> None:
        check_below(arrays["tokens"], self.plan.tokenizer.vocab_size, "tokens", "the number of token ids")
        check_below(arrays["loss_mask"], 2, "loss_mask", "it is 0 or 1")
        for name in ("num_tokens", "num_positions"):
            check_rows(arrays[name] < 1, arrays[name], name, "is less than 1")
        labels_P = arrays.get("labels")
        if labels_P is not None and labels_P.dtype.kind == "i" and self.plan.targets.kind != "outputs":
            wrong_P = (labels_P < NO_LABEL) | (labels_P >= self.plan.num_ids)
            check_rows(wrong_P, labels_P, "labels", f"is none of the {self.plan.num_ids} ids of the targets, or -1")
        elif labels_P is not None and labels_P.dtype.kind == "f":
            check_rows(np.isinf(labels_P), labels_P, "labels", "is not finite")
        check_sequences(self.plan.task, arrays)

    def decode(self, arrays: Mapping[str, Any]) -> TokenRows:
        labels_P = arrays.get("labels")
        if labels_P is not None:
            labels_P = labels_P.astype(np.int64 if labels_P.dtype.kind == "i" else np.float32)
        return TokenRows(
            tokens_T=arrays["tokens"].astype(np.uint32),
            # A copy, since positions that shall not count are what a loop of one's own changes most often.
            loss_mask_P=arrays["loss_mask"].astype(np.uint8),
            segment_ids_T=arrays.get("segment_ids"),
            labels_P=labels_P,
            token_index_P=arrays.get("token_index"),
        )

    def columns(self, name: str, batch: SequenceBatch) -> dict[str, pa.Array]:
        tokens, positions = batch.token_offsets_N1, batch.position_offsets_N1
        found = {
            "tokens": (batch.tokens_T, tokens),
            "segment_ids": (batch.segment_ids_T, tokens),
            "loss_mask": (batch.loss_mask_P, positions),
            "labels": (batch.labels_P, positions),
            "token_index": (batch.token_index_P, positions),
        }
        return {name: lists(values, offsets) for name, (values, offsets) in found.items() if values is not None}


def tokens_field(vocab_size: int, optional: Iterable[ArrayRecord] = ()) -> FieldRecord:
    """Describe the field of the tokens; ``optional`` are the arrays that the task stores of its sequences."""
    dtype = id_dtype(vocab_size)
    arrays = (
        ArrayRecord(name="tokens", dtype=dtype, rows="tokens"),
        ArrayRecord(name="loss_mask", dtype="uint8", rows="positions"),
        ArrayRecord(name="num_tokens", dtype="uint32", rows="sequences"),
        ArrayRecord(name="num_positions", dtype="uint32", rows="sequences"),
        *optional,
    )
    return FieldRecord(name=TOKENS_FIELD, kind="tokens", codec={}, arrays=arrays)


def optional_arrays(plan: Plan) -> tuple[ArrayRecord, ...]:
    """Return the arrays that the task of ``plan`` stores of its sequences."""
    return tuple(array for array in plan.field(TOKENS_FIELD).arrays if array in _OPTIONAL)
