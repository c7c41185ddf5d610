"""Causal language modelling: position l of a sequence predicts token l + 1 from tokens 0..l.

The inputs of a sequence of L + 1 tokens are its first L tokens, the labels its last L tokens; index l of every stored
array belongs to label l. Nothing downstream shifts, and labels are not stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus import Corpus, Encoder, SequenceConfig, plan_sequences
from kdcache.fields import SEGMENT_IDS
from kdcache.schema import ArrayRecord, OutputsRecord, Sequence
from kdcache.tasks.base import Sequences, Task, pad


class CausalLM(Task):
    """Predict the next token: GPT-like models."""

    name = "causal-lm"
    summary = "the next token (GPT-like)"
    settings = SequenceConfig
    model_class = "AutoModelForCausalLM"
    body = "tokens"

    def plan(
        self, corpus: Corpus, encoder: Encoder, settings: Any, outputs: OutputsRecord | None, progress: Any = None
    ) -> Sequences:
        """Split long documents, or pack short ones into windows; see ``kdcache.corpus.sequences``."""
        return plan_sequences(corpus, encoder, settings, progress=progress)

    def arrays(self, settings: Any, outputs: OutputsRecord | None) -> tuple[ArrayRecord, ...]:
        """Return segment ids, for packed documents that do not attend to each other."""
        is_packed = settings.packing == "window" and not settings.attend_across_documents
        return (SEGMENT_IDS,) if is_packed else ()

    def labels(self, sequences: list[Sequence]) -> NDArray[np.int64]:
        """Return the next token of every position, [P] int64, sequence by sequence."""
        return np.concatenate([sequence.tokens_T[1:] for sequence in sequences]).astype(np.int64)

    def pad_batch(self, sequences: list[Sequence], pad_id: int) -> dict[str, NDArray[Any]]:
        """Return ``input_ids`` [B, L] int64, ``attention_mask`` [B, L] int64 and ``rows`` [P] int64, right-padded.

        Packed sequences have ``position_ids`` [B, L] instead of the mask, restarting at 0 with every document:
        transformers keeps packed documents apart exactly when it sees restarting position ids and no mask.
        """
        input_ids_BL, real_BL = pad([sequence.tokens_T[:-1] for sequence in sequences], pad_id)
        batch: dict[str, NDArray[Any]] = {"input_ids": input_ids_BL, "rows": np.flatnonzero(real_BL)}
        if sequences[0].segment_ids_T is None:
            return batch | {"attention_mask": real_BL.astype(np.int64)}
        # Padding continues the last document: it comes after every real token, so causality hides it.
        longest = real_BL.shape[1]
        position_ids = np.tile(np.arange(longest, dtype=np.int64), (len(sequences), 1))
        for row, sequence in enumerate(sequences):
            segments_T = sequence.segment_ids_T
            assert segments_T is not None
            starts = np.flatnonzero(np.diff(segments_T[:-1], prepend=segments_T[:1])).astype(np.int64)
            for start in starts:
                position_ids[row, start:] = np.arange(longest - start)
        return batch | {"position_ids": position_ids}
