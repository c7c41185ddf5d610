"""How much one object may decode to: computed from shapes before anything is allocated."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.cache.limits import DEFAULT_BYTES, VARIABLE, decoded_limit
from kdcache.cache.shard_file import pack, unpack
from kdcache.errors import CacheError, ConfigError
from kdcache.schema import ArrayRecord, TargetsRecord
from kdcache.verify.stored import verify_cache
from tests.loops import loop
from tests.synthetic import SyntheticCache


def test_the_limit_is_that_of_the_caller_else_of_the_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert decoded_limit() == DEFAULT_BYTES == 8 << 30
    monkeypatch.setenv(VARIABLE, "20GB")
    assert decoded_limit() == 20 * 10**9
    assert decoded_limit("1MiB") == 1 << 20
    monkeypatch.setenv(VARIABLE, "1000")
    assert decoded_limit() == 1000


@loop("value", ["much", "0", "-1", "1e9", "5 apples"])
def test_a_limit_that_is_none(value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=rf"{VARIABLE} is '{value}', expected a number of bytes above 0"):
        decoded_limit()


def test_a_field_beyond_the_limit(sound, monkeypatch):
    words = rf"shard 0, field \w+, file .* takes [\d,]+ bytes in memory, .*max_decoded_bytes of open_cache.*{VARIABLE}"
    with pytest.raises(CacheError, match=words):
        open_cache(str(sound), max_decoded_bytes=20).read([0])
    monkeypatch.setenv(VARIABLE, "20")
    with pytest.raises(CacheError, match=words):
        open_cache(str(sound)).read([0])
    assert any(VARIABLE in problem for problem in verify_cache(str(sound), deep=True, progress=False).problems)
    open_cache(str(sound), max_decoded_bytes="1MB").read([0])


def test_rectangles_count_too(tmp_path):
    """A ragged row of one id takes as much room in memory as one of 40."""
    record = TargetsRecord(top_k=40, min_mass=0.01)
    SyntheticCache(record=record, shard_sequences=13).write(tmp_path / "cache")
    manifest = open_cache(str(tmp_path / "cache")).manifest
    shard = manifest.shards[0]
    assert shard.num_rows["entries"] < 2 * shard.num_positions
    rectangle = shard.num_positions * 40 * (2 + 4)
    with pytest.raises(CacheError, match=r"field targets, file .* bytes in memory"):
        open_cache(str(tmp_path / "cache"), max_decoded_bytes=rectangle).read([0])
    open_cache(str(tmp_path / "cache"), max_decoded_bytes=2 * rectangle).read([0])


def test_tables_count_before_they_are_decoded(monkeypatch):
    """A table says itself how long it is, so a few bytes of an object may be gigabytes."""
    table = np.zeros(1 << 20, np.uint32)
    data, record = pack({"table/ids": table}), ArrayRecord(name="ids", dtype="uint32", rows="table")
    assert len(data) < 1 << 16
    assert (unpack(data, {"table/ids": (record, None)}, "here", most_bytes=table.nbytes)["table/ids"] == 0).all()
    monkeypatch.setattr("kdcache.cache.shard_file.decode_chunks", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(CacheError, match=r"here takes 4,194,304 bytes in memory, more than the limit of 4,194,303"):
        unpack(data, {"table/ids": (record, None)}, "here", most_bytes=table.nbytes - 1)
