from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest

from kdcache.cache import open_cache
from kdcache.errors import KdcacheError
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import content_of
from tests.dump.fake import BigramTeacher, run_dump

ROOT = Path(__file__).parents[2]


def run_server(python: str, *arguments: object) -> list[dict]:
    result = subprocess.run(
        [python, "-m", "tests.dump.crash_server", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus_file):
    path = tmp_path_factory.mktemp("uninterrupted")
    run_dump(corpus_file, path, BigramTeacher(), layers=(1,), shard_positions=40)
    return path


def check_attempts(attempts: list[dict], output: Path, uninterrupted: Path) -> None:
    assert not [attempt["error"] for attempt in attempts if "error" in attempt]
    *killed, last = attempts
    assert last["exit"] == 0
    for before, after in itertools.pairwise(attempts):
        # What was committed is never touched again: same names, same bytes.
        assert before["committed"].items() <= after["committed"].items()
    assert sum(attempt["killed"] for attempt in killed) >= len(killed) // 2
    assert verify_cache(str(output), deep=True).problems == []
    assert content_of(output) == content_of(uninterrupted)
    names = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    expected = {record.path for shard in open_cache(str(output)).manifest.shards for record in shard.objects.values()}
    commits = {f"commits/{n:06d}.json" for n in range(open_cache(str(output)).manifest.num_shards)}
    others = {"manifest.json", "plan.json", "plan.parquet", "tokenizer/tokenizer.json", "tail_prior.zarr.zip", ".lock"}
    assert names == expected | commits | others  # no garbage of a lost attempt
    # The tail prior is a sum over shards, so a share that was lost or counted twice would show.
    assert (output / "tail_prior.zarr.zip").read_bytes() == (uninterrupted / "tail_prior.zarr.zip").read_bytes()


@pytest.mark.slow
def test_killed_ten_times_at_random(tmp_path, corpus_file, uninterrupted, preloaded):
    attempts = run_server(preloaded, "random", corpus_file, tmp_path / "out", 0, 10)
    assert len(attempts) == 11
    numbers = [len(attempt["committed"]) for attempt in attempts]
    assert len(set(numbers)) > 2  # some attempts got further, none lost anything
    check_attempts(attempts, tmp_path / "out", uninterrupted)


def test_killed_in_the_middle_of_every_kind_of_write(tmp_path, corpus_file, uninterrupted, preloaded):
    attempts = run_server(preloaded, "writing", corpus_file, tmp_path / "out", 0, 12)
    assert len(attempts) == 13
    check_attempts(attempts, tmp_path / "out", uninterrupted)


def test_a_killed_dump_is_no_cache_yet(tmp_path, corpus_file, preloaded):
    # The second write of a start is plan.parquet, the sixth is inside the first shard.
    for num_kills, words in ((2, "there is no cache"), (6, r"unfinished: \d+ of \d+ shards are written")):
        output = tmp_path / str(num_kills)
        command = "import sys; from tests.dump.crash_server import *; kill_in_write(int(sys.argv[3])); "
        command += "run_dump(Path(sys.argv[1]), Path(sys.argv[2]), BigramTeacher(), layers=(1,), shard_positions=40)"
        arguments = [preloaded, "-c", command, str(corpus_file), str(output), str(num_kills)]
        result = subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=60)
        assert result.returncode == -9, result.stderr
        for use in (open_cache, verify_cache):
            with pytest.raises(KdcacheError, match=words):
                use(str(output))
        assert list(output.rglob("*.tmp"))
