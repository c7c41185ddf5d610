"""Looking into a cache: a text, and at chosen positions what the teacher thought would come next (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kdcache.cache import Cache
from kdcache.errors import CacheError, ConfigError, did_you_mean
from kdcache.schema import Targets
from kdcache.tasks import causal_lm


@dataclass(frozen=True)
class Choice:
    """One of the teacher's choices for the next token."""

    token: str
    id: int
    probability: float
    num_draws: int = 0
    """How often it was drawn; its probability is then an estimate. 0: it was kept, with its own probability."""


@dataclass(frozen=True)
class PeekPosition:
    """What the teacher expects after ``before``; ``tail`` is the probability outside the kept ids.

    Where the cache holds draws, they follow the kept ids in ``top``, with their share of the tail.
    """

    position: int
    before: str
    gold: Choice
    top: list[Choice]
    tail: float
    entropy: float
    counts: bool
    """Whether the position counts in the loss."""


@dataclass(frozen=True)
class PeekResult:
    """A sequence, its row of the per-sequence table, and some of its positions."""

    sequence: int
    metadata: dict[str, Any]
    text: str
    positions: list[PeekPosition]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def _spread(targets: Targets, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, targets.num_positions - 1, count).round().astype(np.int64))


def _most_uncertain(targets: Targets, count: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(-targets.entropy_P, kind="stable")[:count])


def _most_surprising(targets: Targets, count: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(targets.gold_logprob_P, kind="stable")[:count])


#: How positions are chosen when none are named.
SELECTIONS = {"spread": _spread, "entropy": _most_uncertain, "loss": _most_surprising}


def peek(
    cache: Cache,
    sequence: int = 0,
    *,
    positions: Sequence[int] = (),
    select: str = "spread",
    count: int = 8,
    top: int = 5,
    context: int = 12,
) -> PeekResult:
    """Decode one sequence and say what the teacher thought at some of its positions.

    ``positions`` are named ones; without them ``count`` are chosen by ``select``. ``context`` is how many tokens of
    text before a position are shown. Raises ``CacheError`` for a sequence or position that does not exist.
    """
    if select not in SELECTIONS:
        raise ConfigError(f"positions cannot be selected by {select!r}, {did_you_mean(select, SELECTIONS)}")
    batch = cache.read([sequence])
    targets = batch.targets
    for position in positions:
        if not 0 <= position < targets.num_positions:
            raise CacheError(f"sequence {sequence} has no position {position}; it has 0 to {targets.num_positions - 1}")
    tokenizer = _load_tokenizer(cache)
    labels = causal_lm.labels([batch.tokens_T])
    chosen = list(positions) or SELECTIONS[select](targets, count).tolist()
    tokens = batch.tokens_T.tolist()

    def choice(token_id: int, logprob: float, num_draws: int = 0) -> Choice:
        return Choice(_show(tokenizer, token_id), token_id, float(np.exp(logprob)), num_draws)

    found = [
        PeekPosition(
            position=p,
            before=tokenizer.decode(tokens[max(0, p + 1 - context) : p + 1], skip_special_tokens=False),
            gold=choice(int(labels[p]), targets.gold_logprob_P[p]),
            top=[choice(*favourite) for favourite in _favourites(targets, p, top)],
            tail=float(np.exp(targets.log_tail_P[p])),
            entropy=float(targets.entropy_P[p]),
            counts=bool(batch.loss_mask_P[p]),
        )
        for p in chosen
    ]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    return PeekResult(sequence, cache.metadata(sequence), text, found)


def _favourites(targets: Targets, position: int, count: int) -> list[tuple[int, float, int]]:
    """Return the first ids of a position: kept ones with their log-probabilities, then drawn ones, and how often each.

    A share of the tail says little of an id by itself (one draw may be of any), so draws never go before kept ids.
    """
    row = targets.take(slice(position, position + 1))
    ids_PJ, logprobs_PJ, _ = row.merged()
    counts_J = np.zeros(ids_PJ.shape[1], dtype=np.int64)
    if row.draws is not None:
        counts_J[row.top_k :] = row.draws.counts_PJ[0]
    order = np.lexsort((-logprobs_PJ[0], counts_J > 0))
    live = [j for j in order if logprobs_PJ[0, j] > -np.inf][:count]
    return [(int(ids_PJ[0, j]), float(logprobs_PJ[0, j]), int(counts_J[j])) for j in live]


def _load_tokenizer(cache: Cache) -> Tokenizer:
    text = cache.tokenizer_json()
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise CacheError(f"the tokenizer.json of {cache.folder} cannot be read: {error}") from None


def _show(tokenizer: Any, token_id: int) -> str:
    """Return a token as text; one that is no text by itself (a piece of a character) as its raw form."""
    text: str = tokenizer.decode([token_id], skip_special_tokens=False)
    if text and "\ufffd" not in text:
        return text
    return tokenizer.id_to_token(token_id) or f"<{token_id}>"
