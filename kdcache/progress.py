"""Progress bars on standard error, with rate, elapsed time and ETA; the same format for every command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def bar(total: int, title: str, unit: str, *, enabled: bool = True, initial: int = 0) -> tqdm[Any]:
    """Return a progress bar over ``total`` units, ``initial`` of them done; silent unless ``enabled``."""
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        unit_scale=True,
        disable=not enabled,
        dynamic_ncols=True,
        smoothing=0.1,
        leave=True,
    )


def reporter(progress: tqdm[Any]) -> Callable[[int, int], None]:
    """Return a callback ``(done, total)`` that updates ``progress``."""

    def report(done: int, total: int) -> None:
        if progress.total != total:
            progress.total = total
        progress.update(done - progress.n)

    return report
