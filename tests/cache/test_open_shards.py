"""Threads share the shards of a cache: each is opened once, an error reaches all who wait, and few stay open."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.cache.open_shards import OpenShards
from kdcache.cache.shards import FieldArrays, ShardArrays
from kdcache.errors import CorruptCacheError
from tests.cache.test_reader import check_batch
from tests.caches import SOURCE
from tests.loops import loop

ONE = ("targets",)


def shard_of(num_bytes: int, fields: Sequence[str] = ONE) -> dict[str, FieldArrays]:
    return {name: FieldArrays({"x": np.zeros(num_bytes, np.uint8)}) for name in fields}


def bytes_of(shard: ShardArrays) -> int:
    return sum(field.num_bytes for field in shard.fields.values())


class Loader:
    """Loads when it is told to, and remembers what."""

    def __init__(self, error: Exception | None = None) -> None:
        self.loaded: list[int] = []
        self.has_begun, self.may_go = threading.Event(), threading.Event()
        self.error = error

    def __call__(self, shard: int, fields: Sequence[str]) -> dict[str, FieldArrays]:
        self.loaded.append(shard)
        self.has_begun.set()
        assert self.may_go.wait(10)
        if self.error is not None:
            raise self.error
        return shard_of(100, fields)


def test_threads_that_need_a_shard_open_it_once():
    loader = Loader()
    shards = OpenShards(loader, 8, 1 << 20)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(shards.get, 3, ONE) for _ in range(4)]
        assert loader.has_begun.wait(10)
        assert not any(future.done() for future in futures)
        loader.may_go.set()
        first, *others = [future.result(10) for future in futures]
    assert loader.loaded == [3]
    assert all(other.fields == first.fields for other in others)
    assert all(other.fields["targets"] is first.fields["targets"] for other in others)


def test_another_shard_does_not_wait():
    loader = Loader()
    shards = OpenShards(lambda shard, fields: loader(shard, fields) if shard == 3 else shard_of(1), 8, 1 << 20)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(shards.get, 3, ONE)
        assert loader.has_begun.wait(10)
        assert bytes_of(shards.get(4, ONE)) == 1
        assert not slow.done()
        loader.may_go.set()
        assert bytes_of(slow.result(10)) == 100


def test_an_error_reaches_everyone_and_is_not_kept():
    loader = Loader(CorruptCacheError("damaged"))
    shards = OpenShards(loader, 8, 1 << 20)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shards.get, 3, ONE)
        assert loader.has_begun.wait(10)
        second = pool.submit(shards.get, 3, ONE)
        loader.may_go.set()
        for future in (first, second):
            with pytest.raises(CorruptCacheError, match="damaged"):
                future.result(10)
    loader.error = None
    assert bytes_of(shards.get(3, ONE)) == 100
    assert shards.num_bytes() == 100


def test_fields_of_a_shard_are_opened_once_whatever_is_read_with_them():
    loaded: list[tuple[int, Sequence[str]]] = []
    shards = OpenShards(lambda shard, fields: loaded.append((shard, fields)) or shard_of(100, fields), 1, 1 << 20)
    for fields in (("tokens", "targets"), ("tokens", "targets", "hidden-1"), ("hidden-1", "tokens"), ("targets",)):
        assert set(shards.get(3, fields).fields) == set(fields)
    assert loaded == [(3, ("tokens", "targets")), (3, ("hidden-1",))]
    assert shards.num_bytes() == 300
    shards.get(4, ONE)
    assert shards.num_bytes() == 100, "a shard is forgotten with all of its fields"


@loop(("max_shards", "max_bytes", "expected"), [(2, 1 << 20, 2), (8, 350, 3), (8, 50, 1), (1, 0, 1)])
def test_few_stay_open(max_shards, max_bytes, expected):
    loaded: list[int] = []
    shards = OpenShards(lambda shard, fields: loaded.append(shard) or shard_of(100), max_shards, max_bytes)
    for shard in range(6):
        shards.get(shard, ONE)
    assert shards.num_bytes() == 100 * expected
    for shard in range(5, 5 - expected, -1):  # the latest ones are still there
        shards.get(shard, ONE)
    assert loaded == list(range(6))


def test_threads_read_what_one_reads_and_open_every_shard_once(sound, monkeypatch):
    reads: list[str] = []
    cache = open_cache(str(sound))
    real = cache.folder.read
    monkeypatch.setattr(cache.folder, "read", lambda name, **how: reads.append(name) or real(name, **how))
    wanted = [np.random.default_rng(n).permutation(13)[: 1 + n % 13].tolist() for n in range(60)]
    start = threading.Barrier(6)

    def read(part):
        start.wait(10)
        return [cache.read(indices) for indices in part]

    with ThreadPoolExecutor(6) as pool:
        parts = [wanted[n::6] for n in range(6)]
        for part, batches in zip(parts, pool.map(read, parts), strict=True):
            for indices, batch in zip(part, batches, strict=True):
                check_batch(batch, SOURCE, indices)
    assert len(reads) == 2 * 3  # tokens and targets


def test_threads_with_room_for_one_shard(sound):
    cache = open_cache(str(sound), max_open_shards=1)
    wanted = [np.random.default_rng(n).permutation(13).tolist() for n in range(24)]
    with ThreadPoolExecutor(4) as pool:
        for indices, batch in zip(wanted, pool.map(cache.read, wanted), strict=True):
            check_batch(batch, SOURCE, indices)
    one = open_cache(str(sound), max_open_shards=1)
    one.read([0])
    assert cache.open_bytes() <= 3 * one.open_bytes()


def test_damage_is_found_with_checksums_and_by_chance_without(copy):
    cache = open_cache(str(copy))
    path = copy / cache.manifest.shards[0].objects["hidden-1"].path
    data = bytearray(path.read_bytes())
    start = data.index(b"positions/states/c/0/0") + len("positions/states/c/0/0")
    data[start + 40] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptCacheError, match=r"shard 0, field hidden-1, .*chunk 0 is damaged, its crc32c"):
        cache.read([0], fields=["hidden-1"])
    assert "hidden-1" in open_cache(str(copy), check_crc=False).read([0], fields=["hidden-1"]).hidden


def test_a_new_shard_displaces_one_that_the_batch_does_not_need(written, monkeypatch):
    reads: list[str] = []
    cache = open_cache(str(written("tail prior")), max_open_shards=3)
    real = cache.folder.read
    monkeypatch.setattr(cache.folder, "read", lambda name, **how: reads.append(name) or real(name, **how))
    cache.read([0, 4, 8])
    assert len(reads) == 2 * 3  # tokens and targets
    cache.read([12, 0, 4])  # shard 0 was used longest ago, but is needed again
    assert len(reads) == 2 * 4  # tokens and targets


def test_the_number_of_open_shards_can_be_changed(sound):
    cache = open_cache(str(sound), max_open_shards=1)
    cache.read(range(13))
    few = cache.open_bytes()
    cache.max_open_shards = 3
    cache.read(range(13))
    assert cache.open_bytes() > 2 * few
