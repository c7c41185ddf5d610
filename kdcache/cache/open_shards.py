"""The shards that are in memory: the latest ones, each field opened once, whatever the number of threads that want it.

Fields of a shard are opened when they are first asked for, so reading with hidden states and without holds the targets
once. A thread that needs a field which another one is just opening waits for it, and gets its error if it fails. Then
the field is forgotten, so that the next one to ask tries again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future

from kdcache.cache.shards import FieldArrays, ShardArrays

Fields = dict[str, "Future[FieldArrays]"]


class OpenShards:
    """Encoded shards by number: at most ``max_shards`` and ``max_bytes`` (but one stays in any case).

    ``load`` opens some fields of a shard.
    """

    def __init__(
        self, load: Callable[[int, Sequence[str]], Mapping[str, FieldArrays]], max_shards: int, max_bytes: int
    ) -> None:
        self._load = load
        self.max_shards = max_shards
        self._max_bytes = max_bytes
        self._shards: OrderedDict[int, Fields] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int, fields: Sequence[str]) -> ShardArrays:
        """Return fields of a shard, from memory where they were used lately; raises what ``load`` raises."""
        with self._lock:
            known = self._shards.setdefault(shard, {})
            self._shards.move_to_end(shard)
            missing = {name: Future[FieldArrays]() for name in fields if name not in known}
            known.update(missing)
            wanted = {name: known[name] for name in fields}
        if missing:
            self._fill(shard, missing)
        return ShardArrays({name: future.result() for name, future in wanted.items()})

    def keep(self, shards: Iterable[int]) -> None:
        """Count those of ``shards`` that are in memory as just used.

        Called before a batch is read: otherwise a new shard would displace one that the same batch needs a moment
        later, which would then be opened again and displace the next.
        """
        with self._lock:
            for shard in shards:
                if shard in self._shards:
                    self._shards.move_to_end(shard)

    def clear(self) -> None:
        """Forget all shards."""
        with self._lock:
            self._shards.clear()

    def num_bytes(self) -> int:
        """Return the bytes of all shards that are in memory."""
        with self._lock:
            return self._num_bytes()

    def _fill(self, shard: int, missing: Fields) -> None:
        try:
            loaded = self._load(shard, tuple(missing))
        except BaseException as error:
            with self._lock:
                known = self._shards.get(shard, {})
                for name, future in missing.items():
                    if known.get(name) is future:
                        del known[name]
                if not known:
                    self._shards.pop(shard, None)
            for future in missing.values():
                future.set_exception(error)
            return
        for name, future in missing.items():
            future.set_result(loaded[name])
        with self._lock:
            self._make_room(shard)

    def _make_room(self, newest: int) -> None:
        """Forget what was used longest ago, except shards that are being opened: others may be waiting for them."""
        for shard in list(self._shards):
            if len(self._shards) <= self.max_shards and self._num_bytes() <= self._max_bytes:
                return
            if shard != newest and all(future.done() for future in self._shards[shard].values()):
                del self._shards[shard]

    def _num_bytes(self) -> int:
        return sum(
            future.result().num_bytes for fields in self._shards.values() for future in fields.values() if future.done()
        )
