"""Causal language modelling: row l of a sequence predicts token l + 1 from tokens 0..l.

Alignment happens here and nowhere else. A sequence of L + 1 tokens is fed to teacher and student as its first L
tokens; its labels are its last L tokens; row l of every stored array belongs to label l. Nobody downstream shifts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.schema import SequenceBatch

NAME = "causal-lm"


def labels(tokens: list[NDArray[np.uint32]]) -> NDArray[np.int64]:
    """Return the next token of every row, [P] int64, sequence by sequence."""
    return np.concatenate([item[1:] for item in tokens]).astype(np.int64)


def pad_batch(
    tokens: list[NDArray[np.uint32]],
    pad_id: int,
    segment_ids: list[NDArray[np.uint16]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Right-pad sequences of L_n + 1 tokens into model inputs and aligned labels.

    Returns ``input_ids`` [B, L] int64; ``attention_mask`` [B, L] int64; ``rows`` [P] int64, the index of every real
    position in the flattened [B * L] grid, sequence by sequence (so ``hidden.reshape(B * L, D)[rows]`` lines up with
    the flat arrays of a `SequenceBatch`); ``labels`` [P] int64, the next token of each row. With ``segment_ids`` (a
    packed batch) also ``position_ids`` [B, L], restarting at 0 with every document; ``attention_mask`` is then left
    out, because transformers keeps packed documents apart exactly when it sees restarting position ids and no mask.
    """
    lengths = np.array([len(item) - 1 for item in tokens], dtype=np.int64)
    longest = int(lengths.max())
    real_BL = np.arange(longest) < lengths[:, None]
    input_ids = np.full(real_BL.shape, pad_id, dtype=np.int64)
    input_ids[real_BL] = np.concatenate([item[:-1] for item in tokens])
    batch: dict[str, NDArray[Any]] = {
        "input_ids": input_ids,
        "rows": np.flatnonzero(real_BL),
        "labels": labels(tokens),
    }
    if segment_ids is None:
        batch["attention_mask"] = real_BL.astype(np.int64)
    else:
        # Padding continues the last document: it comes after every real token, so causality hides it.
        position_ids = np.tile(np.arange(longest, dtype=np.int64), (len(tokens), 1))
        for row, segments in enumerate(segment_ids):
            starts = np.flatnonzero(np.diff(segments[:-1], prepend=segments[:1])).astype(np.int64)
            for start in starts:
                position_ids[row, start:] = np.arange(longest - start)
        batch["position_ids"] = position_ids
    return batch


def collate(batch: SequenceBatch, pad_id: int) -> dict[str, NDArray[Any]]:
    """Turn decoded sequences into one training batch: `pad_batch` plus the teacher's rows.

    Adds, for the P real positions: ``loss_mask`` [P] bool, ``teacher_ids`` [P, K] int64, ``teacher_logprobs``
    [P, K] float32, ``teacher_log_tail``, ``teacher_gold_logprob`` and ``teacher_entropy`` [P] float32, and each
    stored hidden state under its field name, [P, D] float32. Draws stand among the ids (`Targets.merged`). Where the
    batch has them: ``teacher_log_tails`` [P, G] float32, the tails at other temperatures, and ``teacher_hidden``
    [P, D] float32, the teacher's last hidden state (``batch.hidden["last"]``).
    """
    pieces = np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])
    segments = None
    if batch.segment_ids_T is not None:
        segments = np.split(batch.segment_ids_T, batch.token_offsets_N1[1:-1])
    targets = batch.targets
    ids_PK, logprobs_PK, log_tail_P = targets.merged()
    optional = {"teacher_log_tails": targets.log_tails_PG, "teacher_hidden": batch.hidden.get("last")}
    return {
        **pad_batch(pieces, pad_id, segments),
        "loss_mask": batch.loss_mask_P.astype(bool),
        "teacher_ids": ids_PK.astype(np.int64),
        "teacher_logprobs": logprobs_PK,
        "teacher_log_tail": log_tail_P,
        "teacher_gold_logprob": targets.gold_logprob_P,
        "teacher_entropy": targets.entropy_P,
        **{name: array for name, array in optional.items() if array is not None},
        **{name: states_PD for name, states_PD in batch.hidden.items() if name != "last"},
    }
