"""``kdcache transcode`` as a user sees it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kdcache.cache import open_cache
from kdcache.verify.stored import verify_cache
from tests.cli.test_commands import SCRIPT


def test_fewer_ids(run, dumped, tmp_path):
    out = tmp_path / "made"
    outcome = run("transcode", dumped, out, "--top-k", 3, "--codec", "compact", "--no-hidden-states", "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    manifest, source = open_cache(str(out)).manifest, open_cache(str(dumped)).manifest
    assert f"Wrote {source.num_positions:,} positions in {source.num_shards} shards to {out}" in outcome.out
    assert f"(source {source.bytes_per_token:.1f})" in outcome.out
    assert "Every byte was read again and is as written." in outcome.out
    assert (manifest.top_k, manifest.hidden_layers) == (3, ())
    assert manifest.field("targets").codec["name"] == "compact"
    assert verify_cache(str(out), deep=True).ok
    again = run(
        "transcode", dumped, out, "--top-k", 3, "--codec", "compact", "--no-hidden-states", "--quiet", "--no-verify"
    )
    assert again.out == f"{out} is complete already; nothing was written.\n"


def test_json(run, dumped, tmp_path):
    arguments = ["transcode", dumped, tmp_path / "made", "--where", "num_positions >= 10", "--limit-sequences", 5]
    estimate = json.loads(run(*arguments, "--dry-run", "--json").out)
    assert not (tmp_path / "made").exists()
    outcome = run(*arguments, "--json")
    result = json.loads(outcome.out)
    assert result["num_sequences"] == estimate["num_sequences"] == 5
    assert result["num_positions"] == result["num_positions_written"] == estimate["num_positions"]
    assert result["verified"]
    assert "transcode" in outcome.err  # progress
    assert "verify" in outcome.err


def test_a_dry_run_for_people(run, dumped, tmp_path):
    outcome = run("transcode", dumped, tmp_path / "made", "--min-prob", "0.05", "--hidden-states", "last", "--dry-run")
    assert outcome.code == 0
    for words in ("kind top-k, top_k 6, min_prob 0.05", "bytes/token", "hidden-2", "Nothing was written"):
        assert words in outcome.out
    assert "hidden-1" not in outcome.out
    assert not (tmp_path / "made").exists()


def test_settings_from_a_file(run, dumped, tmp_path):
    (tmp_path / "t.yaml").write_text("targets: {top_k: 5, codec: {name: compact, grid: 4}}\nwhere: num_positions > 3\n")
    options = ["--config", tmp_path / "t.yaml", "--top-k", 4, "--set", "targets.codec.grid=8", "--quiet"]
    assert run("transcode", dumped, tmp_path / "made", *options).code == 0
    manifest = open_cache(str(tmp_path / "made")).manifest
    assert manifest.top_k == 4
    assert manifest.field("targets").codec["grid"] == 8
    [link] = manifest.provenance["transcoded"]
    assert link["settings"]["where"] == "num_positions > 3"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-k", 7], "top_k 7 is more than the 6 ids that it keeps"),
        (["--targets", "sampled"], "only those of the kind hidden can become sampled"),
        (["--temperatures", "2,4"], "no tails at temperature 2, 4, but at no temperature but 1"),
        (["--where", "teacher_los < 3"], "did you mean 'teacher_loss'?"),
        (["--where", "__import__('os').system('id')"], "which is not allowed; a filter may contain"),
        (["--hidden-states", "0"], "holds no hidden-0; its hidden states are hidden-1, hidden-2"),
        (["--set", "targets.topk=3"], "unknown setting 'topk'; did you mean 'top_k'?"),
        (["--set", "hidden_state.codec=int8"], "unknown setting 'hidden_state'; did you mean 'hidden_states'?"),
        (["--limit-sequences", 0], "'limit_sequences'"),
    ],
    ids=str,
)
def test_mistakes(run, dumped, tmp_path, options, words):
    for dry in ([], ["--dry-run"]):
        assert words in run("transcode", dumped, tmp_path / "made", *options, *dry).message()
    assert not (tmp_path / "made").exists()


def test_places(run, dumped, tmp_path):
    assert "is the source itself" in run("transcode", dumped, dumped).message()
    assert "lies inside the source" in run("transcode", dumped, dumped / "x").message()
    assert "there is no cache in" in run("transcode", tmp_path / "nothing", tmp_path / "made").message()


def test_wrong_usage(run, dumped, tmp_path):
    for options in (
        ["--no-hidden-states", "--hidden-states", "1"],
        ["--codec", "zip"],
        ["--targets", "topk"],
        ["--samples", "x"],
    ):
        outcome = run("transcode", dumped, tmp_path / "made", *options)
        assert outcome.code == 2
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
    assert run("transcode", dumped).code == 2


@pytest.mark.parametrize("options", [["--help"], ["--top-k", "3", "--quiet"], ["--dry-run"]], ids=str)
def test_torch_is_not_loaded(dumped, tmp_path, options):
    command = [sys.executable, "-c", SCRIPT, "transcode", str(dumped), str(tmp_path / "made"), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "0 []", result.stderr
