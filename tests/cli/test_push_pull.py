"""``kdcache push`` and ``kdcache pull`` as a user sees them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kdcache.cache import open_cache
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import snapshot
from tests.cli.test_commands import SCRIPT


@pytest.fixture
def url(object_store):
    return f"{object_store}/caches/one"


def test_push_and_pull(run, dumped, url, tmp_path):
    planned = run("push", dumped, url, "--dry-run", "--quiet")
    assert planned.code == 0
    assert planned.out.startswith("Would copy ")
    assert planned.out.endswith("Nothing was written.\n")
    assert "there is no cache" in run("inspect", url).message()

    pushed = run("push", dumped, url)
    assert pushed.code == 0, pushed.err
    fingerprint = open_cache(str(dumped)).fingerprint
    assert f"to {url}: all of it" in pushed.out
    assert f"fingerprint {fingerprint[:16]}" in pushed.out
    assert "move: 100%" in pushed.err  # in bytes, with rate and time
    assert "B/s" in pushed.err
    assert run("verify", url, "--deep", "--quiet").code == 0

    pulled = run("pull", url, tmp_path / "back", "--jobs", 2, "--quiet")
    assert (pulled.code, pulled.err) == (0, "")
    assert snapshot(tmp_path / "back") == snapshot(dumped)
    again = run("pull", url, tmp_path / "back", "--quiet")
    assert f"{tmp_path / 'back'} has all " in again.out


def test_json_and_a_part(run, dumped, url, tmp_path):
    arguments = ["push", dumped, url, "--fields", "targets, hidden-1", "--shards", "1-2,0", "--json", "--quiet"]
    planned = json.loads(run(*arguments, "--dry-run").out)
    done = json.loads(run(*arguments).out)
    assert (planned.pop("dry_run"), done.pop("dry_run")) == (True, False)
    del planned["elapsed_s"], done["elapsed_s"]
    assert planned == done
    assert (done["is_part"], done["num_shards"]) == (True, 3)
    manifest = open_cache(url).manifest
    assert (manifest.num_shards, manifest.hidden_layers) == (3, ("hidden-1",))
    assert manifest.num_sequences == sum(s.num_sequences for s in open_cache(str(dumped)).manifest.shards[:3])
    assert verify_cache(url, deep=True).problems == []
    assert "a part, as a cache of its own" in run("pull", dumped, tmp_path / "x", "--shards", 0, "--quiet").out


def test_mistakes(run, dumped, url, tmp_path):
    assert "did you mean 'hidden-1'" in run("push", dumped, url, "--fields", "hidden1", "--quiet").message()
    assert "neither a number nor a range" in run("push", dumped, url, "--shards", "all", "--quiet").message()
    assert "there is no cache in" in run("pull", url, tmp_path / "x", "--quiet").message()
    run("push", dumped, url, "--quiet")
    other = run("push", dumped, url, "--shards", "0", "--quiet").message()
    assert f"holds a cache with the fingerprint {open_cache(url).fingerprint[:16]}" in other
    assert "cannot open nonsense://x" in run("push", dumped, "nonsense://x", "--quiet").message()
    assert "does not exist" in run("push", dumped, "s3://no-such-bucket-here/x", "--quiet").message()
    assert run("push", dumped, url, "--jobs", "0").code == 2


def test_no_torch(dumped, tmp_path):
    arguments = ["push", str(dumped), str(tmp_path / "x"), "--quiet"]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "0 []", result.stderr
    assert verify_cache(str(tmp_path / "x")).ok


@pytest.mark.parametrize("name", ["a::b", "file::b", "[glob]*", "percent%20#q?x", "new\nline", "~tilde", "-dash"])
def test_a_directory_with_an_odd_name_is_that_directory(run, dumped, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert run("pull", dumped, "--quiet", "--", f"./{name}").code == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert run("verify", "--quiet", "--", f"./{name}").code == 0
