"""The local store: shared by processes, bounded at every moment, never giving out what is not whole."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import layout, open_cache
from kdcache.cache.prefetch import THREADS, largest_shard_bytes, required_bytes
from kdcache.config import build
from kdcache.errors import CacheError, ConfigError
from kdcache.storage import retry
from kdcache.storage.folder import Folder
from kdcache.storage.local_store import LocalStore, LocalStoreConfig
from tests.cache.http_store import serving
from tests.synthetic import SyntheticCache

#: Ten shards of one sequence each.
MANY = SyntheticCache(num_sequences=10, shard_sequences=1)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "cache"
    MANY.write(path)
    return path


@pytest.fixture
def server(many, monkeypatch):
    monkeypatch.setattr(retry, "PAUSES_S", (0.01, 0.02))
    with serving(many) as server:
        yield server


def store_config(tmp_path, **settings):
    return LocalStoreConfig(directory=str(tmp_path / "store"), **settings)


def stored(tmp_path):
    with open(tmp_path / "store" / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nothing moves while this looks
        return {path.name: path.stat().st_size for path in (tmp_path / "store" / "objects").glob("*/*")}


def partial(tmp_path):
    return list((tmp_path / "store" / "partial").iterdir())


def targets(cache):
    return [shard.objects["targets"] for shard in cache.manifest.shards]


READ = ("tokens", "targets")  # what is read of every shard


def hashes(cache, shards):
    return {cache.manifest.shards[shard].objects[name].sha256 for shard in shards for name in READ}


def wait_until(condition, limit_s=100.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def child(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


READ_ALL = """
import sys
from kdcache.cache import open_cache
from kdcache.storage.local_store import LocalStoreConfig
cache = open_cache(sys.argv[1], local_store=LocalStoreConfig(directory=sys.argv[2]))
for batch in cache.batches(1, threads=2, seed=int(sys.argv[3])):
    print(batch.indices[0])
"""


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("20GB", 20 * 10**9), ("1.5 tb", 1.5 * 10**12), ("512MiB", 512 * 2**20), ("7", 7), ("3kB", 3000), (12, 12)],
)
def test_sizes(text, num_bytes):
    assert build(LocalStoreConfig, {"max_bytes": text}).max_bytes == num_bytes


@pytest.mark.parametrize("text", ["many", "20XB", "-1GB", "", "GB", "1iB", 0])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="max_bytes"):
        build(LocalStoreConfig, {"max_bytes": text})


def test_where_the_store_lies(monkeypatch):
    monkeypatch.setenv("KDCACHE_STORE", "/somewhere")
    assert LocalStoreConfig().path == Path("/somewhere")
    assert LocalStoreConfig(directory="/here").path == Path("/here")
    monkeypatch.delenv("KDCACHE_STORE")
    assert LocalStoreConfig().path == Path("~/.cache/kdcache").expanduser()


def test_a_store_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot make the local store in .*local_store\.directory"):
        open_cache(server.url, local_store=LocalStoreConfig(directory=str(tmp_path / "file")))


def test_a_local_cache_is_not_stored(many, tmp_path):
    open_cache(str(many), local_store=store_config(tmp_path)).read(range(10))
    assert not (tmp_path / "store").exists()


def test_objects_lie_under_their_hash(server, tmp_path):
    cache = open_cache(server.url, local_store=store_config(tmp_path))
    cache.read(range(10))
    records = [shard.objects[name] for shard in cache.manifest.shards for name in READ]
    assert stored(tmp_path) == {record.sha256: record.num_bytes for record in records}
    for path in (tmp_path / "store" / "objects").glob("*/*"):
        assert layout.sha256(path.read_bytes()) == path.name
        assert path.parent.name == path.name[:2]
    assert partial(tmp_path) == []


def test_two_processes_download_each_object_once(server, tmp_path):
    server.bytes_per_s = 100_000
    children = [child(READ_ALL, server.url, tmp_path / "store", seed) for seed in (0, 0, 1)]
    outputs = [process.communicate(timeout=150)[0].split() for process in children]
    assert [sorted(map(int, output)) for output in outputs] == [list(range(10))] * 3
    assert outputs[0] == outputs[1] != outputs[2]
    counts = server.requests_of("fields/targets/") | server.requests_of("sequences/")
    assert len(counts) == 20
    assert set(counts.values()) == {1}


def test_a_killed_download_leaves_nothing_that_is_used(server, tmp_path):
    server.bytes_per_s = 10_000
    process = child(READ_ALL, server.url, tmp_path / "store", 0)
    wait_until(lambda: (tmp_path / "store" / "partial").exists() and partial(tmp_path))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert partial(tmp_path)
    server.bytes_per_s = None
    cache = open_cache(server.url, local_store=store_config(tmp_path))
    assert cache.read([3]).indices == [3]
    assert partial(tmp_path) == [], "the next download removes what is left over"
    for path in (tmp_path / "store" / "objects").glob("*/*"):
        assert layout.sha256(path.read_bytes()) == path.name


def test_a_stored_object_of_another_size_is_fetched_again(server, tmp_path):
    open_cache(server.url, local_store=store_config(tmp_path)).read([0])
    for path in (tmp_path / "store" / "objects").glob("*/*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert open_cache(server.url, local_store=store_config(tmp_path)).read([0]).indices == [0]


def test_a_stored_object_that_has_gone_bad_is_fetched_again(server, tmp_path, caplog):
    config = store_config(tmp_path)
    cache = open_cache(server.url, local_store=config)
    whole = cache.read([0]), cache.sequence_table()
    for path in (tmp_path / "store" / "objects").glob("*/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = open_cache(server.url, local_store=config)
    np.testing.assert_array_equal(again.read([0]).targets.logprobs_PK, whole[0].targets.logprobs_PK)
    assert any("is downloaded again" in record.getMessage() for record in caplog.records)


def test_tables_are_downloaded_at_the_same_time(server, tmp_path):
    server.bytes_per_s = 50_000
    cache = open_cache(server.url, local_store=store_config(tmp_path))
    server.most_at_once = 0
    assert cache.sequence_table()["sequence"].to_pylist() == list(range(10))
    assert server.most_at_once > 2
    assert set(server.requests_of("sequences/").values()) == {1}


def test_what_was_used_longest_ago_goes(server, tmp_path):
    most = largest_shard_bytes(open_cache(server.url).manifest, READ)
    cache = open_cache(server.url, max_open_shards=1, local_store=store_config(tmp_path, max_bytes=3 * most))
    for shard in (0, 1, 2, 0, 3):
        cache._open_shard(shard)
        time.sleep(0.01)
        assert sum(stored(tmp_path).values()) <= 3 * most
    assert set(stored(tmp_path)) & {record.sha256 for record in targets(cache)} == {
        targets(cache)[shard].sha256 for shard in (0, 2, 3)
    }
    assert hashes(cache, (0, 2, 3)) <= set(stored(tmp_path))


def test_the_bound_counts_downloads_under_way(server, tmp_path):
    most = max(record.num_bytes for record in targets(open_cache(server.url)))
    cache = open_cache(server.url, local_store=store_config(tmp_path, max_bytes=2 * most))
    server.bytes_per_s = 50_000
    server.most_at_once = 0
    readers = [threading.Thread(target=cache.folder.store.hold, args=(cache.folder, r, "")) for r in targets(cache)]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        assert sum(stored(tmp_path).values()) <= 2 * most
        time.sleep(0.005)
    assert server.most_at_once <= 2


def test_what_a_process_holds_is_not_evicted(server, tmp_path):
    most = max(record.num_bytes for record in targets(open_cache(server.url)))
    config = store_config(tmp_path, max_bytes=2 * most)
    cache = open_cache(server.url, max_open_shards=1, local_store=config)
    code = """
import sys
from kdcache.cache import open_cache
from kdcache.storage.local_store import LocalStoreConfig
cache = open_cache(sys.argv[1], local_store=LocalStoreConfig(directory=sys.argv[2]))
held = cache.folder.store.hold(cache.folder, cache.manifest.shards[4].objects["targets"], "")
print("holding", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    held = targets(cache)[4].sha256
    try:
        assert process.stdout.readline() == "holding\n"
        for shard in (0, 1, 2, 3):
            cache._open_shard(shard)
            assert held in stored(tmp_path)
    finally:
        process.communicate("")
    cache._open_shard(5)
    cache._open_shard(6)
    assert held not in stored(tmp_path), "once it is let go it is like any other"


def test_a_full_store_delays_nobody(server, tmp_path, caplog):
    records = targets(open_cache(server.url))
    config = store_config(tmp_path, max_bytes=max(record.num_bytes for record in records))
    other = LocalStore(config)
    with other.hold(Folder(server.url), records[0], ""):
        cache = open_cache(server.url, local_store=config)
        assert cache.read([5, 6]).indices == [5, 6]
        assert set(stored(tmp_path)) == {records[0].sha256}
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "other processes fill the local store" in warning


def test_an_object_larger_than_the_store(server, tmp_path):
    cache = open_cache(server.url, local_store=store_config(tmp_path, max_bytes=100))
    with pytest.raises(CacheError, match=r"shard 2, field tokens: .* no room for it \(at most 100 bytes"):
        cache.read([2])
    assert server.requests_of("fields/targets/") == {}


def test_a_full_disk(server, tmp_path, monkeypatch):
    cache = open_cache(server.url, local_store=store_config(tmp_path))
    monkeypatch.setattr(LocalStore, "_free_bytes", lambda self: 99)
    with pytest.raises(CacheError, match=r"shard 2, field tokens: .* 99 free on its disk"):
        cache.read([2])


def test_a_hash_that_is_none(server, tmp_path):
    cache = open_cache(server.url, local_store=store_config(tmp_path))
    record = targets(cache)[0].model_copy(update={"sha256": "../../../escape"})
    with pytest.raises(CacheError, match=r"sha256 .*escape., which is not 64 hexadecimal digits"):
        layout.read_object(cache.folder, record, "here")


def test_shards_are_there_before_they_are_needed(server, tmp_path):
    cache = open_cache(server.url, local_store=store_config(tmp_path))
    cache.prefetch([7, 2, 5], ())
    wait_until(lambda: len(stored(tmp_path)) == 6)
    assert set(stored(tmp_path)) == hashes(cache, (7, 2, 5))
    cache.read([7, 2, 5])
    assert set(server.requests_of("fields/targets/").values()) == {1}


def test_no_further_ahead_than_fits(server, tmp_path):
    most = largest_shard_bytes(open_cache(server.url).manifest, READ)
    config = store_config(tmp_path, max_bytes=(2 + THREADS) * most)
    cache = open_cache(server.url, max_open_shards=2, local_store=config)
    cache.prefetch(list(range(10)), ())
    for shard in range(10):
        ahead = hashes(cache, range(shard, min(shard + THREADS, 10)))
        wait_until(lambda ahead=ahead: ahead <= set(stored(tmp_path)))
        time.sleep(0.02)
        assert sum(server.requests_of("fields/targets/").values()) <= shard + THREADS
        cache._open_shard(shard)
        assert sum(stored(tmp_path).values()) <= config.max_bytes
    assert set(server.requests_of("fields/targets/").values()) == {1}


def test_a_plan_replaces_the_one_before(server, tmp_path):
    most = largest_shard_bytes(open_cache(server.url).manifest, READ)
    config = store_config(tmp_path, max_bytes=(1 + THREADS) * most)
    cache = open_cache(server.url, max_open_shards=1, local_store=config)
    cache.prefetch([0, 1, 2, 3], ())
    wait_until(lambda: len(stored(tmp_path)) == 8)
    cache.prefetch([6, 7, 8, 9], ())
    wait_until(lambda: hashes(cache, (6, 7, 8, 9)) <= set(stored(tmp_path)))


def test_a_shard_in_memory_is_not_waited_for(server, tmp_path):
    most = largest_shard_bytes(open_cache(server.url).manifest, READ)
    config = store_config(tmp_path, max_bytes=(1 + THREADS) * most)
    cache = open_cache(server.url, max_open_shards=8, local_store=config)
    cache.read(range(THREADS))
    cache.prefetch(list(range(10)), ())
    cache.read(range(THREADS))
    wait_until(lambda: hashes(cache, range(THREADS, 2 * THREADS)) <= set(stored(tmp_path)))


def test_errors_come_from_the_reader(server, tmp_path):
    cache = open_cache(server.url, local_store=store_config(tmp_path))
    path = targets(cache)[2].path
    server.fault = lambda asked, number, data: (503, b"") if asked == path else None
    cache.prefetch([1, 2, 3], ())
    wait_until(lambda: server.requests[path] >= 3 and len(stored(tmp_path)) == 5)
    assert cache.read([1, 3]).indices == [1, 3]
    with pytest.raises(CacheError, match="shard 2, field targets: cannot download"):
        cache.read([2])
    server.fault = lambda asked, number, data: None
    assert cache.read([2]).indices == [2]


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_threads_end_with_the_cache(server, tmp_path, how):
    others = threading.enumerate()

    def downloading():
        return [t for t in threading.enumerate() if t.name == "kdcache-download" and t not in others]

    cache = open_cache(server.url, local_store=store_config(tmp_path))
    server.bytes_per_s = 2_000
    cache.prefetch(list(range(10)), ())
    assert downloading()
    if how == "closed":
        cache.close()
    else:
        del cache
        gc.collect()
    wait_until(lambda: not downloading())
    assert partial(tmp_path) == []
    assert stored(tmp_path) == {}, "a download under way ends without its object"


def test_required_bytes(many):
    manifest = open_cache(str(many)).manifest
    most = largest_shard_bytes(manifest, ["targets"])
    assert most == max(shard.objects["targets"].num_bytes for shard in manifest.shards)
    assert largest_shard_bytes(manifest, ["targets", "sequences"]) > most

    def shards(**settings):
        return required_bytes(manifest, ["targets"], **settings) // most

    assert shards(shards_at_a_time=2) == 2 + THREADS
    assert shards(shards_at_a_time=1, num_processes=2) == 2 * (1 + THREADS)
    assert shards(shards_at_a_time=8) == 10, "no more than there are"


def test_files_of_others_in_the_directories_of_a_store_stay(many, server, tmp_path):
    """A store that is put into a directory in use neither evicts what lies there nor fails on it."""
    directory = tmp_path / "store"
    others = [directory / name for name in ("objects/ab/thesis.tex", "objects/notes.txt", "partial/x", "partial/y.z")]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("three years of work")
        os.utime(path, (0, 0))
    os.mkfifo(directory / "partial" / ("0" * 64 + ".1"))
    largest = max(item.num_bytes for shard in open_cache(str(many)).manifest.shards for item in shard.objects.values())
    cache = open_cache(server.url, local_store=store_config(tmp_path, max_bytes=3 * largest), max_open_shards=1)
    for index in range(len(cache)):
        cache.read([index])
    assert all(path.read_text() == "three years of work" for path in others)
