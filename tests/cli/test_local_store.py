from __future__ import annotations

import re

import pytest

from tests.cache.http_store import serving


@pytest.fixture
def remote(dumped, tmp_path):
    with serving(dumped) as server:
        yield ["--cache", server.url, "--student-size", "nano", "--output", tmp_path / "run"]


def test_a_store_that_is_too_small(run, remote, tmp_path):
    store = ["--local-store", tmp_path / "store", "--local-store-bytes", "1kB"]
    message = run("train-student", *remote, *store, "--dry-run").message()
    assert re.match(r"local_store.max_bytes is 1,000 and this run needs [\d,]+: ", message)
    assert "--local-store-bytes" in message
    assert (tmp_path / "store").is_dir()


def test_no_size(run, remote):
    message = run("train-student", *remote, "--local-store-bytes", "plenty").message()
    assert "'local_store.max_bytes': a size is a number with a unit" in message
    assert "such as 20GB (found 'plenty')" in message


def test_a_server_that_is_gone(run, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcache.storage.retry.PAUSES_S", ())
    given = ["--cache", "http://127.0.0.1:9", "--student-size", "nano", "--output", tmp_path / "run"]
    assert "cannot reach http://127.0.0.1:9" in run("train-student", *given).message()


def test_peek_into_a_remote_cache(run, dumped):
    with serving(dumped) as server:
        there = run("peek", server.url, "--sequence", 2)
    here = run("peek", dumped, "--sequence", 2)
    assert there.code == here.code == 0
    assert there.out.splitlines()[2:] == here.out.splitlines()[2:]
