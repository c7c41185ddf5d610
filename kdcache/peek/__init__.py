"""Looking into a cache: a text, and what the teacher thought of it or of some of its positions (no torch).

What there is to see depends on the task, so every task has a view, a function from a `PeekContext` at one sequence to a
`View` (the table at the end). One without a view of its own is shown as others whose teachers give the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from kdcache.cache import Cache
from kdcache.cache.reader import as_cache
from kdcache.errors import ConfigError, did_you_mean
from kdcache.peek import answers, tokens
from kdcache.peek.context import PeekContext, View
from kdcache.peek.texts import Texts
from kdcache.peek.tokens import SELECTIONS, Choice, PeekPosition, PeekResult
from kdcache.schema import OUTPUTS_FIELD
from kdcache.tasks import Task, task_of

__all__ = ["SELECTIONS", "VIEWS", "Choice", "PeekPosition", "PeekResult", "View", "peek_cache"]


def peek_cache(
    cache: Cache | str | os.PathLike[str],
    sequence: int = 0,
    *,
    positions: Sequence[int] = (),
    select: str = "spread",
    count: int = 8,
    top: int = 5,
    context: int = 12,
) -> View:
    """Decode one sequence and say what the teacher thought of it.

    Where the teacher answers with tokens the result is a `PeekResult`. ``positions`` are named ones (of masked-lm: the
    places of hidden tokens in the text); without them ``count`` are chosen by ``select``. ``context`` is how many
    tokens of text beside a position are shown. ``top`` is how many choices, classes, documents or numbers are shown.
    Raises ``CacheError`` for a sequence or position that does not exist.
    """
    if select not in SELECTIONS:
        raise ConfigError(f"positions cannot be selected by {select!r}, {did_you_mean(select, SELECTIONS)}")
    cache = as_cache(cache)
    task = task_of(cache.manifest.task)
    if positions and task.gives != "tokens":
        raise ConfigError(
            f"task {task.name} has no positions to choose from: its teacher answers whole texts, which are always shown"
        )
    batch = cache.read([sequence], hidden=() if cache.manifest.outputs is None else (OUTPUTS_FIELD,))
    return view_of(task)(PeekContext(cache, task, Texts(cache), batch, tuple(positions), select, count, top, context))


def view_of(task: Task) -> Callable[[PeekContext], View]:
    """Return what shows the sequences of a task."""
    return VIEWS.get(task.name, _BY_ANSWER[task.gives])


VIEWS: dict[str, Callable[[PeekContext], View]] = {
    "causal-lm": tokens.following,
    "masked-lm": tokens.hidden,
    "seq2seq-lm": tokens.written,
    "sequence-classification": answers.classes,
    "sequence-regression": answers.score,
    "embedding": answers.embedding,
    "ranking": answers.ranking,
}
_BY_ANSWER = {"tokens": tokens.following, "classes": answers.classes, "outputs": answers.score}
