"""The same on a store that is no local disk (fsspec's ``memory://`` stands for any of them)."""

from __future__ import annotations

import uuid

import fsspec
import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.errors import CacheError, CorruptCacheError, IncompleteCacheError
from kdcache.verify.stored import verify_cache
from tests.cache.test_reader import check_batch
from tests.cache.test_writer import content_of
from tests.caches import SOURCE


@pytest.fixture
def url():
    url = f"memory://{uuid.uuid4().hex}/cache"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_write_resume_read_verify(url, sound):
    SOURCE.write(url, shards=range(1), finish=False)
    with pytest.raises(IncompleteCacheError, match="1 of 3 shards"):
        open_cache(url)
    SOURCE.write(url)
    assert content_of(url) == content_of(sound)
    assert verify_cache(url, deep=True).problems == []
    indices = [12, 0, 7, 7]
    check_batch(open_cache(url).read(indices, fields=["hidden-1"]), SOURCE, indices, ["hidden-1"])
    np.testing.assert_array_equal(open_cache(url).lengths_N, SOURCE.lengths)


def test_the_tokenizer_is_copied_here(url):
    SOURCE.write(url)
    cache = open_cache(url)
    directory = cache.tokenizer_dir()
    assert (directory / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert cache.tokenizer_dir() == directory


def test_damage_is_found(url):
    SOURCE.write(url)
    store = fsspec.filesystem("memory")
    path = open_cache(url).manifest.shards[1].objects["hidden-2"].path
    damaged = bytearray(store.cat_file(f"{url}/{path}"))
    damaged[100] ^= 1
    store.pipe_file(f"{url}/{path}", bytes(damaged))
    [problem] = verify_cache(url).problems
    assert problem.startswith(f"shard 1, field hidden-2: file {path} is damaged")
    store.rm_file(f"{url}/{path}")
    [problem] = verify_cache(url).problems
    assert f"file {path} is missing" in problem
    with pytest.raises(CorruptCacheError, match="shard 1, field hidden-2"):
        open_cache(url).read([6], fields=["hidden-2"])


def test_a_foreign_folder_is_refused(url):
    fsspec.filesystem("memory").pipe_file(f"{url}/thesis.tex", b"years of work")
    with pytest.raises(CacheError, match=r"not empty and holds no cache \(found thesis"):
        SOURCE.write(url)


def test_nothing_there(url):
    fsspec.filesystem("memory").pipe_file(f"{url}/x", b"")
    with pytest.raises(CacheError, match="there is no cache in memory://"):
        open_cache(f"{url}/nothing")


def test_only_a_shard_that_is_asked_for_is_fetched(url, monkeypatch):
    SOURCE.write(url)
    cache = open_cache(url)
    fetched = []
    real = cache.folder.fetch
    monkeypatch.setattr(cache.folder, "fetch", lambda name, *rest: fetched.append(name) or real(name, *rest))
    cache.read([0, 1])
    assert [name.split("-")[0] for name in fetched] == ["fields/tokens/000000", "fields/targets/000000"]
