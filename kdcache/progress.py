"""Progress bars on standard error, with rate, elapsed time and ETA; the same format for every command."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def waiting(title: str, *, enabled: bool = True, after_s: float = 1.0) -> Iterator[None]:
    """Show ``title`` and the time that has passed, for work whose end is not known; nothing before ``after_s``."""
    if not enabled:
        yield
        return
    is_done = threading.Event()

    def show() -> None:
        if is_done.wait(after_s):
            return
        with tqdm(desc=title, bar_format="{desc}: {elapsed}", dynamic_ncols=True) as meter:
            while not is_done.wait(1.0):
                meter.refresh()

    thread = threading.Thread(target=show, name="kdcache-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
