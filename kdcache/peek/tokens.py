"""Views of tasks whose teachers answer with tokens: a text, and the teacher's choices at some of its positions.

A position has one number: that of its row, except where only some tokens have rows (masked-lm): there it is the place
of the token in the text, by which people find it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CacheError
from kdcache.peek.context import PeekContext, View
from kdcache.schema import NO_LABEL, Targets


@dataclass(frozen=True)
class Choice:
    """One of the teacher's choices for a token."""

    token: str
    id: int
    probability: float
    num_samples: int = 0
    """How often it was drawn; its probability is then an estimate. 0: it was kept, with its own probability."""


@dataclass(frozen=True)
class PeekPosition:
    """What the teacher expects after ``before``; ``tail`` is the probability outside the kept ids.

    Where the cache holds samples, they follow the kept ids in ``top``, with their share of the tail.
    """

    position: int
    before: str
    gold: Choice | None
    """The corpus's own token; None where there is none."""
    top: list[Choice]
    tail: float
    entropy: float
    counts: bool
    """Whether the position counts in the loss."""


@dataclass(frozen=True)
class MaskedPosition(PeekPosition):
    """What the teacher expects between ``before`` and ``after``, where models are fed the token ``fed``."""

    fed: str
    after: str


@dataclass(frozen=True)
class PeekResult(View):
    """A text as models are fed it, and some of its positions."""

    text: str
    positions: list[PeekPosition]


@dataclass(frozen=True)
class TargetResult(PeekResult):
    """An input (``text``), the target that the corpus has for it, and some positions of the target."""

    target: str


def _spread(targets: Targets, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, targets.num_positions - 1, count).round().astype(np.int64))


def _most_uncertain(targets: Targets, count: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(-targets.entropy_P, kind="stable")[:count])


def _most_surprising(targets: Targets, count: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(targets.gold_logprob_P, kind="stable")[:count])


#: How positions are chosen when none are named.
SELECTIONS = {"spread": _spread, "entropy": _most_uncertain, "loss": _most_surprising}


def following(glance: PeekContext) -> PeekResult:
    """Show what the teacher expects after tokens 0 to p, at positions p."""
    tokens = glance.batch.tokens_T.tolist()
    found = [_position(glance, p, p, tokens[: p + 1]) for p in _rows(glance)]
    return PeekResult(glance.number, glance.metadata, glance.texts.fed(tokens), found)


def written(glance: PeekContext) -> TargetResult:
    """Show an input, and what the teacher expects after the first p tokens of the target, at positions p."""
    source, target = glance.part(0), glance.part(1)
    found = [_position(glance, p, p, target[:p]) for p in _rows(glance)]
    texts = glance.texts
    return TargetResult(glance.number, glance.metadata, texts.fed(source), found, texts.fed(target))


def hidden(glance: PeekContext) -> PeekResult:
    """Show what the teacher expects at tokens that were hidden from it."""
    tokens, texts = glance.batch.tokens_T.tolist(), glance.texts
    glance.check(glance.batch.token_index_P is not None, "there are no places")
    places = np.asarray(glance.batch.token_index_P).tolist()
    glance.check(max(places) < len(tokens), f"a hidden token is at {max(places)}, but there are {len(tokens)} tokens")
    found: list[PeekPosition] = []
    for row in _rows(glance, places):
        place = places[row]
        plain = _position(glance, row, place, tokens[:place])
        after = texts.fed(tokens[place + 1 : place + 1 + glance.context])
        found.append(MaskedPosition(**vars(plain), fed=texts.token(tokens[place]), after=after))
    return PeekResult(glance.number, glance.metadata, texts.fed(tokens), found)


def _rows(glance: PeekContext, names: list[int] | None = None) -> list[int]:
    """Return the rows that are shown; ``names`` are the numbers of all rows for people, if not their own."""
    targets = glance.batch.targets
    known = range(targets.num_positions) if names is None else names
    for position in glance.positions:
        if position not in known:
            there = f"0 to {len(known) - 1}" if names is None else ", ".join(map(str, names))
            raise CacheError(f"sequence {glance.number} has no position {position}; it has {there}")
    if glance.positions:
        return [known.index(position) for position in glance.positions]
    rows: list[int] = SELECTIONS[glance.select](targets, glance.count).tolist()
    return rows


def _position(glance: PeekContext, row: int, position: int, before: list[int]) -> PeekPosition:
    targets, texts = glance.batch.targets, glance.texts
    label = int(glance.task.labels([glance.sequence])[row])

    def choice(token_id: int, logprob: float, num_samples: int = 0) -> Choice:
        return Choice(texts.token(token_id), token_id, float(np.exp(logprob)), num_samples)

    return PeekPosition(
        position=position,
        before=texts.fed(before[max(0, len(before) - glance.context) :]),
        gold=None if label == NO_LABEL else choice(label, targets.gold_logprob_P[row]),
        top=[choice(*favourite) for favourite in _favourites(targets, row, glance.top)],
        tail=float(np.exp(targets.log_tail_P[row])),
        entropy=float(targets.entropy_P[row]),
        counts=bool(glance.batch.loss_mask_P[row]),
    )


def _favourites(targets: Targets, row: int, count: int) -> list[tuple[int, float, int]]:
    """Return the first ids of a row: kept ones with their log-probabilities, then drawn ones, and how often each.

    A share of the tail says little of an id by itself (one draw may be of any), so samples never go before kept ids.
    """
    one = targets.take(slice(row, row + 1))
    ids_PJ, logprobs_PJ, _ = one.merged()
    counts_J = np.zeros(ids_PJ.shape[1], dtype=np.int64)
    if one.samples is not None:
        counts_J[one.top_k :] = one.samples.counts_PJ[0]
    order = np.lexsort((-logprobs_PJ[0], counts_J > 0))
    live = [j for j in order if logprobs_PJ[0, j] > -np.inf][:count]
    return [(int(ids_PJ[0, j]), float(logprobs_PJ[0, j]), int(counts_J[j])) for j in live]
