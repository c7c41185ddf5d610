"""Views of tasks whose teachers answer a whole text: with classes, a score, an embedding, or scores of documents.

Texts are shown without the special tokens around them, as they stand in the corpus (but cut where they were too long).
What the corpus does not say is None.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.peek.context import PeekContext, View
from kdcache.schema import NO_LABEL


@dataclass(frozen=True)
class ClassChoice:
    """A class with the teacher's probability and its raw logit."""

    name: str
    id: int
    probability: float
    logit: float


@dataclass(frozen=True)
class ClassesView(View):
    """A text or a pair of texts, the teacher's most probable classes, and the corpus's own."""

    text: str
    text_pair: str | None
    label: ClassChoice | None
    top: list[ClassChoice]
    entropy: float


@dataclass(frozen=True)
class ScoreView(View):
    """A text or a pair of texts with the teacher's numbers (a regressor has one) and the corpus's own."""

    text: str
    text_pair: str | None
    scores: list[float]
    label: float | None


@dataclass(frozen=True)
class EmbeddedText:
    """A text and the first numbers of its embedding; ``norm`` is the length of the whole vector."""

    text: str
    norm: float
    numbers: list[float]


@dataclass(frozen=True)
class EmbeddingView(View):
    """One text or a pair, with what is known of their embeddings; ``cosine`` and ``label`` are those of a pair."""

    texts: list[EmbeddedText]
    width: int
    pooling: str | None
    normalised: bool | None
    cosine: float | None
    label: float | None


@dataclass(frozen=True)
class RankedDocument:
    """A document, its number among those of the query, the teacher's rank (from 1) and score, and its relevance."""

    document: int
    text: str
    rank: int
    score: float
    relevance: float | None


@dataclass(frozen=True)
class RankingView(View):
    """A query and its documents, best first: the first ``top``, and further ones that the corpus calls relevant."""

    query: str
    num_documents: int
    documents: list[RankedDocument]


def classes(glance: PeekContext) -> ClassesView:
    """Show a text with its classes."""
    targets, names, logits_C = glance.batch.targets, glance.outputs.labels, glance.outputs_PC[0]

    def choice(number: int, logprob: float) -> ClassChoice:
        return ClassChoice(names[number], number, float(np.exp(logprob)), float(logits_C[number]))

    label = int(glance.task.labels([glance.sequence])[0])
    glance.check(label < len(names), f"a label is {label}, but there are {len(names)} classes")
    kept = zip(targets.ids_PK[0].tolist(), targets.logprobs_PK[0], strict=True)
    return ClassesView(
        glance.number,
        glance.metadata,
        *_pair(glance),
        label=None if label == NO_LABEL else choice(label, targets.gold_logprob_P[0]),
        top=[choice(*one) for one in list(kept)[: glance.top]],
        entropy=float(targets.entropy_P[0]),
    )


def score(glance: PeekContext) -> ScoreView:
    """Show a text with its score."""
    scores = glance.outputs_PC[0, : glance.top].astype(float).tolist()
    return ScoreView(glance.number, glance.metadata, *_pair(glance), scores=scores, label=_numbers(glance)[0])


def embedding(glance: PeekContext) -> EmbeddingView:
    """Show a text or a pair of texts with their embeddings."""
    record, vectors_PD = glance.outputs, glance.outputs_PC.astype(np.float64)
    norms_P = np.linalg.norm(vectors_PD, axis=1)
    texts = [
        EmbeddedText(glance.texts.plain(glance.part(row)), float(norms_P[row]), vector_D[: glance.top].tolist())
        for row, vector_D in enumerate(vectors_PD)
    ]
    return EmbeddingView(
        glance.number,
        glance.metadata,
        texts,
        width=record.width,
        pooling=record.pooling,
        normalised=record.normalised,
        cosine=_cosine(vectors_PD) if len(texts) == 2 else None,
        label=_numbers(glance)[0],
    )


def ranking(glance: PeekContext) -> RankingView:
    """Show a query with its documents, those with the highest scores first."""
    scores_P, relevance = glance.outputs_PC[:, 0], _numbers(glance)
    order = np.argsort(-scores_P, kind="stable").tolist()
    documents = [
        RankedDocument(
            # Every document stands behind the query in a pair of its own.
            number,
            glance.texts.plain(glance.part(2 * number + 1)),
            rank,
            float(scores_P[number]),
            relevance[number],
        )
        for rank, number in enumerate(order, 1)
        if rank <= glance.top or (relevance[number] or 0) > 0
    ]
    query = glance.texts.plain(glance.part(0))
    return RankingView(glance.number, glance.metadata, query, len(order), documents)


def _pair(glance: PeekContext) -> tuple[str, str | None]:
    first, second = glance.part(0), glance.part(1)
    return glance.texts.plain(first), glance.texts.plain(second) if second else None


def _numbers(glance: PeekContext) -> list[float | None]:
    """Return the corpus's own number at every row."""
    labels_P = glance.batch.labels_P
    if labels_P is None:
        return [None] * glance.batch.targets.num_positions
    return [None if np.isnan(value) else float(value) for value in labels_P]


def _cosine(vectors_PD: NDArray[np.float64]) -> float | None:
    """Return the cosine of two vectors; None where one of them is nothing."""
    first, second = vectors_PD
    scale = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / scale) if scale > 0 else None
