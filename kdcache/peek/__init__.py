"""Show one sequence of a cache with the teacher's targets (no torch).

What is shown depends on the task: `Task.view` turns a `PeekContext`, one decoded sequence, into a `View`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from kdcache.cache import Cache
from kdcache.cache.reader import as_cache
from kdcache.errors import ConfigError, unknown
from kdcache.peek.context import PeekContext, View
from kdcache.peek.texts import Texts
from kdcache.peek.tokens import SELECTIONS, Choice, PeekPosition, PeekResult
from kdcache.schema import OUTPUTS_FIELD
from kdcache.tasks import task_of

__all__ = ["SELECTIONS", "Choice", "PeekContext", "PeekPosition", "PeekResult", "View", "peek_cache"]


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
    """Decode one sequence and show the teacher's targets.

    Where the teacher predicts tokens, the result is a `PeekResult` with the given ``positions`` (of masked-lm: token
    indices of masked tokens), or else ``count`` of them chosen by ``select`` (``spread``, ``entropy`` or ``loss``).
    ``context`` is the number of tokens shown around a position, ``top`` the number of choices, classes, documents or
    components. Raises ``CacheError`` for a sequence or position that does not exist.
    """
    if select not in SELECTIONS:
        raise ConfigError(unknown("selection of positions", select, SELECTIONS))
    cache = as_cache(cache)
    task = task_of(cache.manifest.task)
    if positions and task.gives != "tokens":
        raise ConfigError(
            f"positions cannot be chosen for task {task.name}: its teacher answers whole texts; leave them out"
        )
    batch = cache.read([sequence], fields=() if cache.manifest.outputs is None else (OUTPUTS_FIELD,))
    found: View = task.view(
        PeekContext(cache, task, Texts(cache), batch, tuple(positions), select, count, top, context)
    )
    return found
