"""A cache on a server that is slow, cuts connections and damages what it sends reads as it does from a local disk."""

from __future__ import annotations

import contextlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.storage import retry
from kdcache.storage.folder import Folder
from kdcache.storage.local_store import LocalStoreConfig
from tests.cache.http_store import serving
from tests.cache.test_reader import check_batch
from tests.caches import SOURCE


@pytest.fixture
def server(sound, monkeypatch):
    monkeypatch.setattr(retry, "PAUSES_S", (0.01, 0.01, 0.02, 0.02))
    with serving(sound) as server:
        yield server


def cut(data):
    return 200, data[: len(data) // 2]


def flipped(data):
    return 200, data[:50] + bytes([data[50] ^ 1]) + data[51:]


def busy(data):
    return 503, b"busy"


FAULTS = [cut, flipped, busy]


def same_as_on_disk(server, sound, tmp_path):
    here = open_cache(str(sound))
    there = open_cache(server.url, local_store=LocalStoreConfig(directory=str(tmp_path / "store")))
    for epoch in range(2):
        for batches in (pair := [cache.batches(3, seed=5, fields=["hidden-1"]) for cache in (here, there)]):
            batches.set_epoch(epoch)
        for a, b in zip(*pair, strict=True):
            assert a.indices == b.indices
            np.testing.assert_array_equal(a.tokens_T, b.tokens_T)
            np.testing.assert_array_equal(a.targets.ids_PK, b.targets.ids_PK)
            np.testing.assert_array_equal(a.targets.logprobs_PK, b.targets.logprobs_PK)
            np.testing.assert_array_equal(a.hidden["hidden-1"], b.hidden["hidden-1"])
    return there


def test_a_sound_server(server, sound, tmp_path):
    there = same_as_on_disk(server, sound, tmp_path)
    assert set(server.requests_of("fields/targets/").values()) == {1}, "two epochs download each object once"
    np.testing.assert_array_equal(there.lengths_N, SOURCE.lengths)
    assert (there.tokenizer_dir() / "tokenizer.json").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_twice(server, sound, tmp_path, fault):
    # A flipped byte of the manifest is the one thing that nothing can notice: it holds the checksums of the rest.
    spared = "manifest.json" if fault is flipped else None
    server.fault = lambda path, number, data: fault(data) if number < 2 and path != spared else None
    same_as_on_disk(server, sound, tmp_path)
    assert set(server.requests_of("fields/targets/").values()) == {3}


def test_a_slow_server(server, sound, tmp_path):
    server.bytes_per_s = 20_000
    same_as_on_disk(server, sound, tmp_path)


@pytest.mark.parametrize("fault", [cut, flipped])
def test_what_stays_damaged_is_named(server, tmp_path, fault):
    cache = open_cache(server.url, local_store=LocalStoreConfig(directory=str(tmp_path)))
    path = cache.manifest.shards[1].objects["hidden-2"].path
    server.fault = lambda asked, number, data: fault(data) if asked == path else None
    with pytest.raises(CacheError) as caught:
        cache.read([6], fields=["hidden-2"])
    assert isinstance(caught.value, CorruptCacheError) is (fault is flipped)
    assert re.search(f"shard 1, field hidden-2: .*{re.escape(f'{server.url}/{path}')}", str(caught.value))
    assert server.requests[path] == 5
    assert cache.read([6]).indices == [6], "the other fields are sound"
    server.fault = lambda asked, number, data: None
    check_batch(cache.read([6], fields=["hidden-2"]), SOURCE, [6], ["hidden-2"])


def test_a_server_that_is_gone(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "PAUSES_S", (0.01, 0.01, 0.02, 0.02))
    with serving(sound) as server:
        cache = open_cache(server.url, local_store=LocalStoreConfig(directory=str(tmp_path)))
        cache.read([0])
    assert cache.read([1]).indices == [1], "shard 0 is here already"
    with pytest.raises(CacheError, match=r"shard 1, field tokens: cannot download http.* in 5 attempts"):
        cache.read([6])
    with pytest.raises(CacheError, match="cannot reach http"):
        open_cache(server.url)


def test_a_missing_object_is_not_asked_for_again(server, tmp_path):
    cache = open_cache(server.url, local_store=LocalStoreConfig(directory=str(tmp_path)))
    path = cache.manifest.shards[1].objects["tokens"].path
    server.directory = tmp_path
    with pytest.raises(CorruptCacheError, match=f"shard 1, field tokens: file {path} is missing"):
        cache.read([6])
    assert server.requests[path] == 1


def test_no_cache_at_an_address(server):
    with pytest.raises(CacheError, match="there is no cache in http"):
        open_cache(f"{server.url}/elsewhere")


def test_from_s3(object_store, tmp_path):
    url = f"{object_store}/cache"
    SOURCE.write(url)
    cache = open_cache(url, local_store=LocalStoreConfig(directory=str(tmp_path)))
    indices = [12, 0, 7, 7]
    check_batch(cache.read(indices, fields=["hidden-1"]), SOURCE, indices, ["hidden-1"])
    # From the second time on S3 is not asked.
    cache.folder.fetch = None
    again = open_cache(url, local_store=LocalStoreConfig(directory=str(tmp_path)))
    again.folder.fetch = None
    check_batch(again.read(indices, fields=["hidden-1"]), SOURCE, indices, ["hidden-1"])


@pytest.mark.parametrize("is_honest", [True, False])
def test_a_file_that_does_not_end_is_not_read(is_honest, forbid_large_arrays):
    """Whatever the server says of its size."""

    class Endless(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()

        def do_GET(self):
            self.send_response(200)
            if is_honest:
                self.send_header("Content-Length", str(20 << 30))
            else:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(OSError):  # until the client hangs up
                while True:
                    data = bytes(1 << 20)
                    self.wfile.write(data if is_honest else b"%x\r\n%s\r\n" % (len(data), data))

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    forbid_large_arrays(1 << 30)
    try:
        folder = Folder(f"http://127.0.0.1:{server.server_port}/cache")
        with pytest.raises(
            CorruptCacheError, match=r"file manifest\.json of http.* bytes, at most 16,777,216 are expected"
        ):
            folder.read("manifest.json", max_bytes=16 << 20)
    finally:
        server.shutdown()
        server.server_close()
