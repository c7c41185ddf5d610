"""The shards that are in memory: the latest ones, each opened once, whatever the number of threads that want it.

A thread that needs a shard which another one is just opening waits for it, and gets its error if it fails. Then the
shard is forgotten, so that the next one to ask tries again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from kdcache.cache.shards import ShardArrays

Key = tuple[int, tuple[str, ...]]


class OpenShards:
    """Encoded shards by number and fields: at most ``max_shards`` and ``max_bytes`` (but one stays in any case)."""

    def __init__(self, load: Callable[[int, tuple[str, ...]], ShardArrays], max_shards: int, max_bytes: int) -> None:
        self._load = load
        self.max_shards = max_shards
        self._max_bytes = max_bytes
        self._shards: OrderedDict[Key, Future[ShardArrays]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int, fields: tuple[str, ...]) -> ShardArrays:
        """Return a shard, from memory when it was used lately; raises what ``load`` raises."""
        key = (shard, fields)
        with self._lock:
            future = self._shards.get(key)
            is_mine = future is None
            if future is None:
                future = self._shards[key] = Future()
            self._shards.move_to_end(key)
        if is_mine:
            self._fill(key, future)
        return future.result()

    def keep(self, shards: Iterable[int], fields: tuple[str, ...]) -> None:
        """Count those of ``shards`` that are in memory as just used.

        Said before a batch is read, or a new shard would displace one that the same batch needs a moment later, which
        would then be opened again and displace the next.
        """
        with self._lock:
            for shard in shards:
                if (shard, fields) in self._shards:
                    self._shards.move_to_end((shard, fields))

    def clear(self) -> None:
        """Forget all shards."""
        with self._lock:
            self._shards.clear()

    def num_bytes(self) -> int:
        """Return the bytes of all shards that are in memory."""
        with self._lock:
            return self._num_bytes()

    def _fill(self, key: Key, future: Future[ShardArrays]) -> None:
        try:
            arrays = self._load(*key)
        except BaseException as error:
            with self._lock:
                self._shards.pop(key, None)
            future.set_exception(error)
            return
        future.set_result(arrays)
        with self._lock:
            self._make_room(key)

    def _make_room(self, newest: Key) -> None:
        """Forget what was used longest ago, except shards that are being opened: others may be waiting for them."""
        for key in list(self._shards):
            if len(self._shards) <= self.max_shards and self._num_bytes() <= self._max_bytes:
                return
            if key != newest and self._shards[key].done():
                del self._shards[key]

    def _num_bytes(self) -> int:
        return sum(future.result().num_bytes for future in self._shards.values() if future.done())
