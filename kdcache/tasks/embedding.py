"""Embeddings of texts, for search: a position is a text, and the teacher predicts one pooled vector.

A document is one text, or a pair of texts (column ``text_pair``), such as a question and its answer or two sentences
that were compared. A pair is one sequence with two positions, so that its texts are in the same micro-batch. The label
of a pair (column ``label``) is stored at both positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus import TEXT, Corpus, Encoder, Role
from kdcache.fields import NUMBER_LABELS, SEGMENT_IDS
from kdcache.plugins import import_row
from kdcache.schema import ArrayRecord, OutputsRecord, Sequence
from kdcache.tasks.base import Metrics, Sequences, Task, TaskSettings, padded_inputs
from kdcache.tasks.documents import BuiltSequence, Document, build_sequences, joined, special_tokens, texts_of
from kdcache.tasks.labels import number_label, numbers


class EmbeddingSettings(TaskSettings):
    """How states of tokens become one vector; ``auto``: as in the teacher's files, else mean and normalised."""

    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    normalise: bool | Literal["auto"] = "auto"
    prefix: str = ""
    """Prepended to every text, such as ``query: ``."""


class Embedding(Task):
    """Embed texts."""

    name = "embedding"
    summary = "a text, with its embedding"
    roles = (TEXT, Role("text_pair", False), Role("label", False))
    settings = EmbeddingSettings
    gives = "outputs"
    model_class = "AutoModel"
    body = "pooled"
    objective: ClassVar[dict[str, Any]] = {"output_cosine": {"weight": 1.0}}

    def plan(
        self, corpus: Corpus, encoder: Encoder, settings: Any, outputs: OutputsRecord | None, progress: Any = None
    ) -> Sequences:
        """Build one sequence from every text or pair."""
        return build_sequences(corpus, settings, partial(_build, corpus, encoder, settings), progress)

    def arrays(self, settings: Any, outputs: OutputsRecord | None) -> tuple[ArrayRecord, ...]:
        """Return segment ids (the text of a pair that a token belongs to) and labels."""
        return (SEGMENT_IDS, NUMBER_LABELS)

    def pad_batch(self, sequences: list[Sequence], pad_id: int) -> dict[str, NDArray[Any]]:
        """Return ``input_ids`` and ``attention_mask`` [B, L] of all texts, and ``rows`` [B]."""
        texts = [text for sequence in sequences for text in split_parts(sequence)]
        return {**padded_inputs(texts, pad_id), "rows": np.arange(len(texts))}

    def view(self, context: Any) -> Any:
        """Return the texts with the first components of their embeddings."""
        return import_row("kdcache.peek.answers:embedding")(context)

    def metrics(self, answers: Any, teacher: Any) -> Metrics:
        """Return correlations with the labels of pairs, and the cosine with the teacher."""
        return import_row("kdcache.evaluate.measures:embedding")(answers, teacher)


def split_parts(sequence: Sequence) -> list[NDArray[np.uint32]]:
    """Return the tokens of each part of a sequence."""
    segments_T = np.asarray(sequence.segment_ids_T)
    return np.split(sequence.tokens_T, np.flatnonzero(np.diff(segments_T)) + 1)


def _build(
    corpus: Corpus, encoder: Encoder, settings: EmbeddingSettings, start: int, rows: list[Document]
) -> Iterator[list[BuiltSequence]]:
    around = encoder.around(1)
    room = settings.max_length - special_tokens(around)
    firsts, seconds = (
        texts_of(encoder, texts, settings.prefix)
        for texts in ([text for text, _ in rows], [more.get("text_pair") for _, more in rows])
    )
    ids = corpus.document_ids(range(start, start + len(rows)))
    for first, second, (_, more), document in zip(firsts, seconds, rows, ids, strict=True):
        label = number_label(more.get("label"), document)
        if not first:
            yield []
            continue
        parts = [part for part in (first, second) if part]
        fed = [joined([part[:room]], around)[0] for part in parts]
        segments = np.repeat(np.arange(len(fed), dtype=np.uint16), [len(part) for part in fed])
        is_cut = any(len(part) > room for part in parts)
        yield [BuiltSequence(np.concatenate(fed), segments, numbers([label] * len(fed)), is_truncated=is_cut)]
