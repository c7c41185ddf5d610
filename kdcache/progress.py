"""Progress bars: one look for every command (rate, elapsed time, ETA), on standard error, silent when told so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def bar(total: int, title: str, unit: str, *, enabled: bool = True, initial: int = 0) -> tqdm[Any]:
    """Return a progress bar over ``total`` units."""
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
    """Return a callback (done, total) that moves ``progress``."""

    def report(done: int, total: int) -> None:
        if progress.total != total:
            progress.total = total
        progress.update(done - progress.n)

    return report
