"""Write shards in a second thread while the next one is made.

numpy, blosc and the disk release the GIL, so encoding and writing hardly slow the first thread down. Memory is bounded
by the number of shards that may wait. A write that fails (a full disk, a lost lease, an object store that is gone) must
stop the work soon: `WriteBehind.check` raises its error, and is cheap enough to be called after every batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Record = TypeVar("Record")


class WriteBehind(Generic[Item, Record]):
    """Calls ``write`` for one item after another in a second thread; use it as a context manager.

    ``max_pending`` is how many items may exist that are not written yet, the one being written included. ``written``
    are the records that ``write`` returned, in order. Leaving the context waits for all pending writes, also when the
    work in it failed: what was made is then kept. After a failed write the writes behind it are dropped.
    """

    def __init__(self, write: Callable[[Item], Record], *, max_pending: int = 1) -> None:
        self.written: list[Record] = []
        self._write, self._max_pending = write, max_pending
        self._failure: BaseException | None = None
        self._pending: deque[Future[Record]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kdcache-writer")

    def __enter__(self) -> WriteBehind[Item, Record]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._pool:  # waits for what is pending
            while self._pending and kind is None:
                self._take()

    def check(self) -> None:
        """Raise the error of a write that has failed; waits for nothing."""
        while self._pending and self._pending[0].done():
            self._take()

    def put(self, item: Item) -> None:
        """Have ``item`` written; waits until no more than ``max_pending`` items, this one included, are pending."""
        while len(self._pending) >= self._max_pending:
            self._take()
        self._pending.append(self._pool.submit(self._write_one, item))

    def _take(self) -> None:
        """Wait for the oldest write; raise its error, or keep its record."""
        self.written.append(self._pending.popleft().result())

    def _write_one(self, item: Item) -> Record:
        if self._failure is not None:
            raise self._failure
        try:
            return self._write(item)
        except BaseException as error:
            self._failure = error
            raise
