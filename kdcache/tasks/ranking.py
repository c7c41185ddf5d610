"""Ranking, for search: a sequence is a query with its candidate documents; a position is a document, with a raw score.

A cross-encoder reads query and document together. So the pairs are stored as model inputs, one after another; the
segment ids of pair k are 2k in the query and 2k + 1 in the document, so a bi-encoder student finds query and documents
in the same tokens. The relevance of the documents (column ``relevance``) is stored if the corpus has it. Too long
documents are truncated, queries are not. A document that is null or empty is an empty text, so position k is always
document k of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.corpus import Corpus, Encoder, Role
from kdcache.errors import CorpusError
from kdcache.fields import NUMBER_LABELS, SEGMENT_IDS
from kdcache.plugins import import_row
from kdcache.schema import ArrayRecord, OutputsRecord, Sequence
from kdcache.tasks.base import Metrics, Sequences, Task, TaskSettings, padded_inputs
from kdcache.tasks.documents import BuiltSequence, Document, build_sequences, joined, special_tokens, texts_of
from kdcache.tasks.labels import number_label, numbers


class RankingSettings(TaskSettings):
    """``max_length`` is the most tokens of a query with one document, special tokens included."""

    max_documents: int = Field(default=32, ge=2, le=10_000)
    """Most documents of a query; only the first ones are used."""


class Ranking(Task):
    """Score documents for queries."""

    name = "ranking"
    summary = "a document of a query, with its score"
    roles = (Role("query"), Role("documents"), Role("relevance", False))
    settings = RankingSettings
    gives = "outputs"
    model_class = "AutoModelForSequenceClassification"
    body = "logits"
    objective: ClassVar[dict[str, Any]] = {"margin_mse": {"weight": 1.0}}

    def plan(
        self, corpus: Corpus, encoder: Encoder, settings: Any, outputs: OutputsRecord | None, progress: Any = None
    ) -> Sequences:
        """Build one sequence from every query with its documents."""
        return build_sequences(corpus, settings, partial(_build, corpus, encoder, settings), progress)

    def arrays(self, settings: Any, outputs: OutputsRecord | None) -> tuple[ArrayRecord, ...]:
        """Return segment ids (the pair and the text of it that a token belongs to) and the relevance."""
        return (SEGMENT_IDS, NUMBER_LABELS)

    def pad_batch(self, sequences: list[Sequence], pad_id: int) -> dict[str, NDArray[Any]]:
        """Return ``input_ids``, ``attention_mask`` and ``token_type_ids`` [P, L] of all pairs, and ``rows`` [P]."""
        pairs, kinds = [], []
        for sequence in sequences:
            segments_T = np.asarray(sequence.segment_ids_T)
            borders = np.flatnonzero(np.diff(segments_T // 2)) + 1
            pairs += np.split(sequence.tokens_T, borders)
            kinds += np.split(segments_T % 2, borders)
        return {**padded_inputs(pairs, pad_id, kinds), "rows": np.arange(len(pairs))}

    def view(self, context: Any) -> Any:
        """Return the query with its documents, ranked by the teacher."""
        return import_row("kdcache.peek.answers:ranking")(context)

    def metrics(self, answers: Any, teacher: Any) -> Metrics:
        """Return nDCG, MRR and hit rate, and the agreement with the teacher's ranking."""
        return import_row("kdcache.evaluate.measures:ranking")(answers, teacher)


class BiEncoderRanking(Ranking):
    """The same task for a student that reads query and document separately."""

    model_class = "AutoModel"
    body = "bi-encoder"


BI_ENCODER = BiEncoderRanking()


def _build(
    corpus: Corpus, encoder: Encoder, settings: RankingSettings, start: int, rows: list[Document]
) -> Iterator[list[BuiltSequence]]:
    around = encoder.around(2)
    ids = corpus.document_ids(range(start, start + len(rows)))
    queries = texts_of(encoder, [query for query, _ in rows])
    for query, (_, more), document in zip(queries, rows, ids, strict=True):
        texts, relevance = _candidates(more, document, settings.max_documents)
        parts = texts_of(encoder, texts)
        if not query or not any(parts):
            yield []
            continue
        room = settings.max_length - special_tokens(around) - len(query)
        if room < 1:
            raise CorpusError(
                f"{document}: the query has {len(query)} tokens, which leaves no room for a document in a max_length "
                f"of {settings.max_length}; raise it (--max-length), or shorten that query"
            )
        pairs = [joined([query, part[:room]], around) for part in parts]
        segments = np.concatenate([2 * n + kinds for n, (_, kinds) in enumerate(pairs)]).astype(np.uint16)
        is_cut = any(len(part) > room for part in parts) or len(more["documents"]) > settings.max_documents
        yield [BuiltSequence(np.concatenate([tokens for tokens, _ in pairs]), segments, relevance, is_truncated=is_cut)]


def _candidates(more: dict[str, Any], where: str, most: int) -> tuple[list[str | None], NDArray[np.float32]]:
    """Return the first documents of a query, and the relevance of each."""
    texts = _require_list(more.get("documents"), f"{where}: documents", "texts")
    strange = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if strange is not None:
        raise CorpusError(f"{where}: expected a list of texts as documents, found {strange!r} among them")
    judged = more.get("relevance")
    relevance = [None] * len(texts) if judged is None else _require_list(judged, f"{where}: relevance", "numbers")
    if len(relevance) != len(texts):
        raise CorpusError(
            f"{where}: there are {len(texts)} documents, but {len(relevance)} values of relevance; give one number (or "
            "null) for each document"
        )
    return texts[:most], numbers([number_label(value, where) for value in relevance[:most]])


def _require_list(value: Any, where: str, of: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise CorpusError(
            f"{where}: expected a list of {of}, found {type(value).__name__}; other columns: --column ROLE=NAME"
        )
    return value or []
