"""A dump straight to an object store: killed, finished by the same command, verified, and trained from."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import yaml

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import CacheError, IncompleteCacheError
from kdcache.storage.folder import Folder
from kdcache.storage.lease import LEASE
from kdcache.train import TrainConfig, train_student
from kdcache.transcode import TranscodeConfig, transcode_cache
from kdcache.transfer.copy import copy_cache
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import content_of
from tests.conftest import dump_settings
from tests.train_runs import settings

#: ``kdcache dump-teacher``, killed where it is about to commit its third shard.
KILLED = """
import os, signal, sys
from kdcache.storage.folder import Folder
from kdcache.cli import main

write = Folder.write

def write_or_die(folder, name, data):
    if name == "commits/000002.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, name, data)

Folder.write = write_or_die
sys.argv = ["kdcache", *sys.argv[1:]]
main()
"""


@pytest.fixture
def config(teacher_dir, corpus_file, object_store):
    """The settings of the fixture ``dumped``, to another place."""
    return dump_settings(f"{object_store}/dumps/one", teacher_dir, corpus_file)


@pytest.mark.slow
def test_killed_and_finished(config, dumped, tmp_path, preloaded):
    url = config["output"]
    (tmp_path / "dump.yaml").write_text(yaml.safe_dump(config))
    command = [preloaded, "-c", KILLED, "dump-teacher", "--config", str(tmp_path / "dump.yaml"), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == -9, result.stderr
    with pytest.raises(IncompleteCacheError, match="unfinished: 2 of "):
        open_cache(url)
    assert Folder(url).exists(LEASE)
    before = {name: Folder(url).read(name) for name in Folder(url).names("commits")}

    made = dump_teacher(build(DumpConfig, config), progress=False)
    assert made.num_shards_written == made.manifest.num_shards - 2
    assert content_of(url) == content_of(dumped)
    assert {name: Folder(url).read(name) for name in before} == before
    assert verify_cache(url, deep=True).problems == []
    assert not Folder(url).exists(LEASE)
    named = {record.path for shard in made.manifest.shards for record in shard.objects.values()}
    there = {
        name
        for part in ("sequences", "fields/tokens", "fields/targets", "fields/hidden-1", "fields/hidden-2")
        for name in Folder(url).names(part)
    }
    assert there == named  # nothing is left of the attempt that was killed

    again = dump_teacher(build(DumpConfig, config), progress=False)
    assert (again.num_shards_written, again.manifest) == (0, made.manifest)
    with pytest.raises(CacheError, match=r"holds another cache: .*top_k is 6 there and 5 here"):
        dump_teacher(build(DumpConfig, config | {"targets": {"top_k": 5, "codec": "exact"}}), progress=False)

    losses = [_train(cache, tmp_path / name) for name, cache in (("remote", url), ("local", dumped))]
    assert losses[0] == losses[1]

    part = str(tmp_path / "part")
    copy_cache(url, part, shards=[0, 2], fields=["targets"], progress=False)
    assert verify_cache(part, deep=True).problems == []
    assert np.isfinite(_train(part, tmp_path / "of the part")["loss"])

    smaller = f"{url}-small"
    transcode_cache(build(TranscodeConfig, {"source": url, "output": smaller, "targets": {"top_k": 3}}), progress=False)
    assert open_cache(smaller).manifest.top_k == 3


def _train(cache, output) -> dict[str, float]:
    return train_student(build(TrainConfig, settings(cache, output, max_steps=2)), progress=False).losses
