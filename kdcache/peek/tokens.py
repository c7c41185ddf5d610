"""Views of tasks whose teacher predicts tokens: a text, and the teacher's choices at some of its positions.

A position is named by its number in the sequence. Where only some tokens are predicted (masked-lm), it is named by its
token index, so that it can be found in the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CacheError, ConfigError
from kdcache.peek.context import PeekContext, View, gold_logprob, one_line, probability, shown
from kdcache.schema import NO_LABEL, Targets


@dataclass(frozen=True)
class Choice:
    """One of the teacher's choices for a token."""

    token: str
    id: int
    probability: float | None
    """None where the cache does not store it."""
    num_samples: int = 0
    """How often it was sampled; its probability is then an estimate. 0: it was kept, with its exact probability."""


@dataclass(frozen=True)
class PeekPosition:
    """The teacher's prediction after ``before``; ``tail`` is the probability of all ids that were not kept.

    Where the cache holds samples, they follow the kept ids in ``top``, each with its share of the tail.
    """

    position: int
    before: str
    gold: Choice | None
    """The gold token; None where there is none."""
    top: list[Choice]
    tail: float
    entropy: float | None
    """In nats; None where the cache does not store it."""
    counts: bool
    """Whether the position counts in the loss."""

    def lines(self) -> list[str]:
        """Return the position as lines of text, the gold token marked with a star."""
        gold = self.gold
        note = "" if self.counts else "  (does not count in the loss)"
        found = [f"position {self.position}: ...{self._around()}{note}"]
        for choice in self.top:
            mark = "*" if gold is not None and choice.id == gold.id else " "
            found.append(f"  {mark} {shown(choice.probability)}  {choice.token!r}{_sampled(choice, gold)}")
        if gold is not None and gold.id not in {choice.id for choice in self.top}:
            found.append(f"  * {shown(gold.probability)}  {gold.token!r}  ({self._gold_note})")
        entropy = "" if self.entropy is None else f", entropy {self.entropy:.3f} nats"
        return [*found, f"    tail {self.tail:.4f}{entropy}"]

    _gold_note: ClassVar[str] = "the next token"

    def _around(self) -> str:
        return f"{one_line(self.before)[-60:]}|"


@dataclass(frozen=True)
class MaskedPosition(PeekPosition):
    """The teacher's prediction between ``before`` and ``after``, where models are fed the token ``fed``."""

    fed: str
    after: str

    _gold_note: ClassVar[str] = "the masked token"

    def _around(self) -> str:
        return f"{super()._around()}{one_line(self.fed)}|{one_line(self.after)[:60]}..."


@dataclass(frozen=True)
class PeekResult(View):
    """The text that models are fed, and some of its positions."""

    text: str
    positions: list[PeekPosition]

    def render(self) -> str:
        """Return the text and its positions, for a terminal."""
        return "\n".join([self._texts(), "", *(line for position in self.positions for line in position.lines())])

    def _texts(self) -> str:
        return self.text


@dataclass(frozen=True)
class TargetResult(PeekResult):
    """An input (``text``), its target, and some positions of the target."""

    target: str

    def _texts(self) -> str:
        return f"input: {self.text}\ntarget: {self.target}"


def _sampled(choice: Choice, gold: Choice | None) -> str:
    if not choice.num_samples:
        return ""
    own = (
        f"; its own probability {shown(gold.probability).strip()}" if gold is not None and choice.id == gold.id else ""
    )
    return f"  (share of {choice.num_samples} {'sample' if choice.num_samples == 1 else 'samples'}{own})"


def _spread(targets: Targets, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, targets.num_positions - 1, count).round().astype(np.int64))


def _most_uncertain(targets: Targets, count: int) -> NDArray[np.int64]:
    assert targets.entropy_P is not None
    return np.sort(np.argsort(-targets.entropy_P, kind="stable")[:count])


def _most_surprising(targets: Targets, count: int) -> NDArray[np.int64]:
    assert targets.gold_logprob_P is not None
    return np.sort(np.argsort(targets.gold_logprob_P, kind="stable")[:count])


#: How positions are chosen when none are given.
SELECTIONS = {"spread": _spread, "entropy": _most_uncertain, "loss": _most_surprising}
#: The scalar that a selection needs.
_NEEDED = {"entropy": "entropy", "loss": "gold_logprob"}


def following(context: PeekContext) -> PeekResult:
    """Show what the teacher predicts after tokens 0 to p, at positions p."""
    tokens = context.batch.tokens_T.tolist()
    found = [_position(context, p, p, tokens[: p + 1]) for p in _rows(context)]
    return PeekResult(context.number, context.metadata, context.texts.fed(tokens), found)


def written(context: PeekContext) -> TargetResult:
    """Show an input, and what the teacher predicts after the first p tokens of the target, at positions p."""
    source, target = context.part(0), context.part(1)
    found = [_position(context, p, p, target[:p]) for p in _rows(context)]
    texts = context.texts
    return TargetResult(context.number, context.metadata, texts.fed(source), found, texts.fed(target))


def masked(context: PeekContext) -> PeekResult:
    """Show what the teacher predicts for the masked tokens."""
    tokens, texts = context.batch.tokens_T.tolist(), context.texts
    context.check(context.batch.token_index_P is not None, "there is no token_index")
    indices = np.asarray(context.batch.token_index_P).tolist()
    context.check(
        max(indices) < len(tokens), f"a masked token is at {max(indices)}, but there are {len(tokens)} tokens"
    )
    found: list[PeekPosition] = []
    for row in _rows(context, indices):
        index = indices[row]
        plain = _position(context, row, index, tokens[:index])
        after = texts.fed(tokens[index + 1 : index + 1 + context.num_around])
        found.append(MaskedPosition(**vars(plain), fed=texts.token(tokens[index]), after=after))
    return PeekResult(context.number, context.metadata, texts.fed(tokens), found)


def _rows(context: PeekContext, names: list[int] | None = None) -> list[int]:
    """Return the numbers of the positions to show; ``names`` are their token indices, where they are named by these."""
    targets = context.batch.targets
    known = range(targets.num_positions) if names is None else names
    for position in context.positions:
        if position not in known:
            there = f"0 to {len(known) - 1}" if names is None else ", ".join(map(str, names))
            raise CacheError(f"sequence {context.number} has no position {position}; it has {there}")
    if context.positions:
        return [known.index(position) for position in context.positions]
    needed = _NEEDED.get(context.select)
    if needed is not None and getattr(targets, f"{needed}_P") is None:
        raise ConfigError(
            f"positions cannot be selected by {context.select}: the cache does not store {needed}; use --select spread "
            "or --at"
        )
    rows: list[int] = SELECTIONS[context.select](targets, context.count).tolist()
    return rows


def _position(context: PeekContext, row: int, position: int, before: list[int]) -> PeekPosition:
    targets, texts = context.batch.targets, context.texts
    label = int(context.task.labels([context.sequence])[row])

    def choice(token_id: int, logprob: float | None, num_samples: int = 0) -> Choice:
        return Choice(texts.token(token_id), token_id, probability(logprob), num_samples)

    return PeekPosition(
        position=position,
        before=texts.fed(before[max(0, len(before) - context.num_around) :]),
        gold=None if label == NO_LABEL else choice(label, gold_logprob(targets, row, label)),
        top=[choice(*one) for one in _top_choices(targets, row, context.top)],
        tail=float(np.exp(targets.log_tail_P[row])),
        entropy=None if targets.entropy_P is None else float(targets.entropy_P[row]),
        counts=bool(context.batch.loss_mask_P[row]),
    )


def _top_choices(targets: Targets, row: int, count: int) -> list[tuple[int, float, int]]:
    """Return the top ids of a position, each with its log-probability and how often it was sampled; kept ids first.

    A share of the tail says little about an id (a single sample may be of any), so samples never precede kept ids.
    """
    one = targets.take(slice(row, row + 1))
    ids_PJ, logprobs_PJ, _ = one.merged()
    counts_J = np.zeros(ids_PJ.shape[1], dtype=np.int64)
    if one.samples is not None:
        counts_J[one.top_k :] = one.samples.counts_PJ[0]
    order = np.lexsort((-logprobs_PJ[0], counts_J > 0))
    live = [j for j in order if logprobs_PJ[0, j] > -np.inf][:count]
    return [(int(ids_PJ[0, j]), float(logprobs_PJ[0, j]), int(counts_J[j])) for j in live]
