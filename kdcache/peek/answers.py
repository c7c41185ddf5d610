"""Views of tasks about whole texts: classes, a score, an embedding, or the scores of a query's documents.

Texts are shown as in the corpus, without the special tokens around them, and truncated where they were too long. A
label that the corpus does not have is None.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.peek.context import PeekContext, View, gold_logprob, one_line, probability, short, shown
from kdcache.schema import NO_LABEL
from kdcache.words import count


@dataclass(frozen=True)
class ClassChoice:
    """A class with the teacher's probability and its raw logit."""

    name: str
    id: int
    probability: float | None
    """None where the cache does not store it."""
    logit: float


@dataclass(frozen=True)
class ClassesView(View):
    """A text or a pair of texts, the teacher's most probable classes, and the label."""

    text: str
    text_pair: str | None
    label: ClassChoice | None
    top: list[ClassChoice]
    entropy: float | None

    def render(self) -> str:
        """Return the text and its classes, for a terminal; the label is marked with a star."""
        label = self.label
        is_shown = label is None or label.id in {choice.id for choice in self.top}
        choices = [*self.top, *([] if is_shown or label is None else [label])]
        width = max(len(choice.name) for choice in choices)
        lines = [_texts(self.text, self.text_pair)]
        for choice in choices:
            mark = "*" if label is not None and choice.id == label.id else " "
            lines.append(f"  {mark} {shown(choice.probability)}  {choice.name:{width}}  logit {choice.logit:8.4f}")
        entropy = "" if self.entropy is None else f"entropy {self.entropy:.3f} nats, "
        return "\n".join([*lines, f"    {entropy}{'no label' if label is None else f'label {label.name}'}"])


@dataclass(frozen=True)
class ScoreView(View):
    """A text or a pair of texts with the teacher's scores (a regressor has one) and the label."""

    text: str
    text_pair: str | None
    scores: list[float]
    label: float | None

    def render(self) -> str:
        """Return the text and its scores, for a terminal."""
        scores = ", ".join(f"{score:.4f}" for score in self.scores)
        return f"{_texts(self.text, self.text_pair)}\n  score {scores}, label {_known(self.label)}"


@dataclass(frozen=True)
class EmbeddedText:
    """A text and the first components of its embedding; ``norm`` is the length of the whole vector."""

    text: str
    norm: float
    numbers: list[float]


@dataclass(frozen=True)
class EmbeddingView(View):
    """One text or a pair with their embeddings; ``cosine`` and ``label`` are those of a pair."""

    texts: list[EmbeddedText]
    width: int
    pooling: str | None
    normalised: bool | None
    cosine: float | None
    label: float | None

    def render(self) -> str:
        """Return the texts and their embeddings, for a terminal."""
        lines = []
        for text in self.texts:
            more = ", ..." if len(text.numbers) < self.width else ""
            numbers = ", ".join(f"{number:.4f}" for number in text.numbers)
            lines.append(f"{text.text}\n  [{numbers}{more}], norm {text.norm:.4f}")
        form = "" if self.normalised is None else f", {'normalised' if self.normalised else 'not normalised'}"
        lines.append(f"\n  {self.width} numbers, {self.pooling or 'no'} pooling{form}")
        if len(self.texts) > 1:
            lines.append(f"  cosine {_known(self.cosine)}, label {_known(self.label)}")
        return "\n".join(lines)


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
    """A query and its documents, best first: the first ``top``, and all others that are relevant."""

    query: str
    num_documents: int
    documents: list[RankedDocument]

    def render(self) -> str:
        """Return the query and its documents, for a terminal; relevant ones are marked with a star."""
        lines = [f"{self.query}\n"]
        for item in self.documents:
            mark = "*" if (item.relevance or 0) > 0 else " "
            judged = "not judged" if item.relevance is None else f"relevance {item.relevance:g}"
            text = short(one_line(item.text), 80)
            lines.append(f"  {mark} {item.rank:3d}. {item.score:8.4f}  {text}  (document {item.document}, {judged})")
        return "\n".join([*lines, f"    {count(len(self.documents), 'document', of=self.num_documents)} shown"])


def _texts(text: str, text_pair: str | None) -> str:
    return f"{text}\n" if text_pair is None else f"{text}\n{text_pair}\n"


def _known(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def classes(context: PeekContext) -> ClassesView:
    """Show a text with its classes."""
    targets, names, logits_C = context.batch.targets, context.outputs.labels, context.outputs_PC[0]

    def choice(number: int, logprob: float | None) -> ClassChoice:
        return ClassChoice(names[number], number, probability(logprob), float(logits_C[number]))

    label = int(context.task.labels([context.sequence])[0])
    context.check(label < len(names), f"a label is {label}, but there are {len(names)} classes")
    kept = zip(targets.ids_PK[0].tolist(), targets.logprobs_PK[0], strict=True)
    return ClassesView(
        context.number,
        context.metadata,
        *_pair(context),
        label=None if label == NO_LABEL else choice(label, gold_logprob(targets, 0, label)),
        top=[choice(*one) for one in list(kept)[: context.top]],
        entropy=None if targets.entropy_P is None else float(targets.entropy_P[0]),
    )


def score(context: PeekContext) -> ScoreView:
    """Show a text with its score."""
    scores = context.outputs_PC[0, : context.top].astype(float).tolist()
    return ScoreView(context.number, context.metadata, *_pair(context), scores=scores, label=_numbers(context)[0])


def embedding(context: PeekContext) -> EmbeddingView:
    """Show a text or a pair of texts with their embeddings."""
    record, vectors_PD = context.outputs, context.outputs_PC.astype(np.float64)
    norms_P = np.linalg.norm(vectors_PD, axis=1)
    texts = [
        EmbeddedText(context.texts.plain(context.part(row)), float(norms_P[row]), vector_D[: context.top].tolist())
        for row, vector_D in enumerate(vectors_PD)
    ]
    return EmbeddingView(
        context.number,
        context.metadata,
        texts,
        width=record.width,
        pooling=record.pooling,
        normalised=record.normalised,
        cosine=_cosine(vectors_PD) if len(texts) == 2 else None,
        label=_numbers(context)[0],
    )


def ranking(context: PeekContext) -> RankingView:
    """Show a query with its documents, those with the highest scores first."""
    scores_P, relevance = context.outputs_PC[:, 0], _numbers(context)
    order = np.argsort(-scores_P, kind="stable").tolist()
    documents = [
        RankedDocument(
            # Each document has a pair of its own, after the query.
            number,
            context.texts.plain(context.part(2 * number + 1)),
            rank,
            float(scores_P[number]),
            relevance[number],
        )
        for rank, number in enumerate(order, 1)
        if rank <= context.top or (relevance[number] or 0) > 0
    ]
    query = context.texts.plain(context.part(0))
    return RankingView(context.number, context.metadata, query, len(order), documents)


def _pair(context: PeekContext) -> tuple[str, str | None]:
    first, second = context.part(0), context.part(1)
    return context.texts.plain(first), context.texts.plain(second) if second else None


def _numbers(context: PeekContext) -> list[float | None]:
    """Return the label of every position; None where it has none."""
    labels_P = context.batch.labels_P
    if labels_P is None:
        return [None] * context.batch.targets.num_positions
    return [None if np.isnan(value) else float(value) for value in labels_P]


def _cosine(vectors_PD: NDArray[np.float64]) -> float | None:
    """Return the cosine of two vectors; None where one of them is zero."""
    first, second = vectors_PD
    scale = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / scale) if scale > 0 else None
