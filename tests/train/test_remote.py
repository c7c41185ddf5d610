"""Training from a cache on a server, through a local store of just the size that it needs."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from kdcache.cache import open_cache
from kdcache.cache.prefetch import required_bytes
from kdcache.config import build
from kdcache.errors import ConfigError
from kdcache.train import TrainConfig, train_student
from kdcache.train.run_record import settings_that_decide
from tests.cache.http_store import serving
from tests.train_runs import settings


def config(cache, output, **changes):
    base = {"num_streams": 1, "max_steps": 3, "batch_sequences": 2}
    return build(TrainConfig, settings(cache, output, **base | changes))


@pytest.fixture
def server(dumped):
    with serving(dumped) as server:
        yield server


def needed_bytes(dumped):
    cache = open_cache(str(dumped))
    assert cache.fields_read() == ["tokens", "targets"]
    return required_bytes(cache.manifest, cache.fields_read(), shards_at_a_time=1)


def weights(directory):
    return load_file(directory / "model.safetensors")


def test_the_student_is_that_of_the_local_cache(server, dumped, tmp_path):
    store = {"directory": str(tmp_path / "store"), "max_bytes": needed_bytes(dumped)}
    train_student(config(server.url, tmp_path / "remote", local_store=store), progress=False)
    train_student(config(dumped, tmp_path / "local"), progress=False)
    remote, local = weights(tmp_path / "remote"), weights(tmp_path / "local")
    assert remote.keys() == local.keys()
    for name in remote:
        np.testing.assert_array_equal(remote[name], local[name])
    assert server.requests_of("fields/targets/")


def test_a_byte_too_small(server, dumped, tmp_path):
    needed = needed_bytes(dumped)
    store = {"directory": str(tmp_path / "store"), "max_bytes": needed - 1}
    with pytest.raises(ConfigError, match=f"max_bytes is {needed - 1:,} and this run needs {needed:,}"):
        train_student(config(server.url, tmp_path / "run", local_store=store), progress=False)
    assert server.requests_of("fields/targets/") == {}


def test_processes_of_a_machine_share_the_store(server, dumped, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    store = {"directory": str(tmp_path / "store"), "max_bytes": needed_bytes(dumped)}
    with pytest.raises(ConfigError, match="the number of processes is 2"):
        train_student(config(server.url, tmp_path / "run", local_store=store), progress=False)


def test_a_local_cache_needs_no_store(dumped, tmp_path):
    store = {"directory": str(tmp_path / "store"), "max_bytes": 1}
    train_student(config(dumped, tmp_path / "run", local_store=store, max_steps=1), progress=False)
    assert not (tmp_path / "store").exists()


def test_a_run_goes_on_with_another_store_and_another_number_of_threads(dumped, tmp_path):
    first = {"local_store": {"directory": str(tmp_path / "a")}, "data_threads": 0}
    second = {"local_store": {"directory": str(tmp_path / "b"), "max_bytes": 10**9}, "data_threads": 2}
    decided = [
        settings_that_decide(config(dumped, tmp_path / "run", **changes).model_dump(mode="json"), 2, 3)
        for changes in (first, second)
    ]
    assert decided[0] == decided[1]
