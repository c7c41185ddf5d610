"""Prefetch: download the shards that are needed next while training uses the current ones.

The plan lists shards in the order of their first use. A few threads take them from its front, download their objects
into the local store, and hold them there until the reader opens the shard, so that they are not evicted before use. How
far the threads run ahead is bounded in bytes and in shards. The threads report no errors: if a download fails, the
reader that needs the shard downloads it again and raises the error. `required_bytes` computes how large a store this
needs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO

from kdcache.schema import Manifest, ObjectRecord
from kdcache.storage.folder import Folder
from kdcache.storage.local_store import LocalStore

log = logging.getLogger(__name__)

#: Concurrent downloads.
THREADS = 4
#: Most shards that are held ahead: every object of a held shard is an open file.
MAX_SHARDS = 32
#: Seconds between attempts to get room in a store that other processes fill.
_RETRY_S = 0.5


@dataclass
class _Held:
    """A shard that is downloaded ahead: its size, and its objects as they arrive."""

    num_bytes: int
    files: list[IO[bytes]] = field(default_factory=list)

    def close(self) -> None:
        """Release the objects."""
        for file in self.files:
            file.close()


class Prefetcher:
    """Downloads shards of the cache in ``folder`` ahead into ``store``."""

    def __init__(self, store: LocalStore, folder: Folder, manifest: Manifest) -> None:
        self._store, self._folder, self._manifest = store, folder, manifest
        self._changed = threading.Condition()
        self._plan: dict[int, dict[str, ObjectRecord]] = {}
        self._held: dict[int, _Held] = {}
        self._max_bytes = 0
        self._closed = False
        self._threads: list[threading.Thread] = []
        store.give_way = self.release

    def expect(self, shards: Iterable[int], fields: Iterable[str], num_open: int) -> None:
        """Replace the plan by ``shards``, in the order of their first use, with the fields that will be read.

        The threads run ahead as far as this process's share of the store has room beyond ``num_open`` shards, and by
        `THREADS` shards in any case.
        """
        names = list(fields)
        plan = {shard: {name: self._manifest.shards[shard].objects[name] for name in names} for shard in shards}
        largest = largest_shard_bytes(self._manifest, names)
        with self._changed:
            for shard in [shard for shard in self._held if shard not in plan]:
                self._release(shard)
            self._plan = {shard: objects for shard, objects in plan.items() if shard not in self._held}
            self._max_bytes = max(self._store.share_bytes - num_open * largest, THREADS * largest)
            self._start()
            self._changed.notify_all()

    def opened(self, shard: int) -> None:
        """Drop ``shard`` from the plan and release it, because the reader has it in memory."""
        if shard in self._plan or shard in self._held:
            with self._changed:
                self._plan.pop(shard, None)
                self._release(shard)
                self._changed.notify_all()

    def release(self) -> None:
        """Release all held shards; they stay in the store as long as there is room."""
        with self._changed:
            for shard in list(self._held):
                self._release(shard)

    def close(self) -> None:
        """Stop the threads and release all shards; a download in progress stops at its next bytes."""
        with self._changed:
            self._closed = True
            self._plan = {}
            for shard in list(self._held):
                self._release(shard)
            self._changed.notify_all()

    def _start(self) -> None:
        # Daemons: a process that ends must not wait for a download.
        while self._plan and len(self._threads) < THREADS and not self._closed:
            thread = threading.Thread(target=self._work, name="kdcache-download", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _release(self, shard: int) -> None:
        held = self._held.pop(shard, None)
        if held is not None:
            held.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_begin())
                if self._closed:
                    return
                shard = next(iter(self._plan))
                objects = self._plan.pop(shard)
                held = self._held[shard] = _Held(_sum_bytes(objects.values()))
            self._download(shard, objects, held)

    def _may_begin(self) -> bool:
        if not self._plan or len(self._held) >= MAX_SHARDS:
            return False
        coming = _sum_bytes(next(iter(self._plan.values())).values())
        return not self._held or coming + sum(held.num_bytes for held in self._held.values()) <= self._max_bytes

    def _download(self, shard: int, objects: dict[str, ObjectRecord], held: _Held) -> None:
        for name, record in objects.items():
            try:
                file = self._wait_for(shard, name, record, held)
            except Exception as error:
                log.debug("shard %d was not downloaded ahead: %s", shard, error)
                file = None
            with self._changed:
                if file is not None:
                    held.files.append(file)
                if file is None or self._held.get(shard) is not held:
                    self._drop(shard, held)
                    return

    def _drop(self, shard: int, held: _Held) -> None:
        """Forget a shard that could not be downloaded in full, or is not in the plan any more."""
        if self._held.get(shard) is held:
            del self._held[shard]
        held.close()
        self._changed.notify_all()

    def _wait_for(self, shard: int, name: str, record: ObjectRecord, held: _Held) -> IO[bytes] | None:
        """Return an object as a held file, None once it is unwanted. Waits while other processes fill the store."""

        def unwanted() -> bool:
            return self._held.get(shard) is not held

        while not unwanted():
            file = self._store.hold(self._folder, record, f"{self._folder}, shard {shard}, field {name}", unwanted)
            if file is not None:
                return file
            with self._changed:
                self._changed.wait_for(unwanted, timeout=_RETRY_S)
        return None


def _sum_bytes(objects: Iterable[ObjectRecord]) -> int:
    return sum(record.num_bytes for record in objects)


def largest_shard_bytes(manifest: Manifest, fields: Iterable[str]) -> int:
    """Return the bytes of the largest shard, counting the objects of the named fields."""
    names = list(fields)
    return max((sum(shard.objects[name].num_bytes for name in names) for shard in manifest.shards), default=0)


def required_bytes(
    manifest: Manifest,
    fields: Iterable[str],
    *,
    shards_at_a_time: int,
    num_processes: int = 1,
) -> int:
    """Return how many bytes a local store needs so that no shard is downloaded twice while it is in use.

    Each of the ``num_processes`` that share the store reads from ``shards_at_a_time`` shards (its streams x shuffle
    window) while `THREADS` more are downloaded. The bound is the size of the whole cache. A shard on the border of two
    streams is used twice in an epoch; unless all shards fit, it may be downloaded twice.
    """
    num_shards = min(num_processes * (shards_at_a_time + THREADS), manifest.num_shards)
    return num_shards * largest_shard_bytes(manifest, fields)
