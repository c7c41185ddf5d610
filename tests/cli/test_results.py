"""What the commands print when all is well."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.schema import TargetsRecord
from kdcache.train import TrainResult
from kdcache.verify.stored import verify_cache
from tests.synthetic import SyntheticCache


def parse(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.fixture
def options(teacher_dir, corpus_file, tmp_path):
    return [
        "dump-teacher",
        *("--teacher", teacher_dir),
        *("--corpus", corpus_file),
        *("--output", tmp_path / "cache"),
        *("--device", "cpu"),
        *("--max-length", 16),
        *("--top-k", 4),
        *("--set", "shard_positions=60"),
        "--quiet",
    ]


def test_dump_teacher(run, options, tmp_path):
    result = parse(run(*options, "--json"))
    manifest = open_cache(str(tmp_path / "cache")).manifest
    assert result["output"] == str(tmp_path / "cache")
    for name in ("num_positions", "num_shards", "num_bytes", "bytes_per_token"):
        assert result[name] == getattr(manifest, name)
    assert result["num_positions_written"] == manifest.num_positions
    assert result["num_shards_written"] == manifest.num_shards > 1
    assert result["tokens_per_s"] > 0
    assert manifest.top_k == 4
    assert manifest.field("targets").codec["name"] == "compact"
    again = run(*options)
    assert again.code == 0
    assert "is complete already; nothing was written" in again.out


def test_dump_teacher_for_people(run, options):
    outcome = run(*options)
    assert outcome.code == 0
    assert "bytes/token" in outcome.out
    assert "Left out of 10 documents: 1 empty, 1 of a single token." in outcome.out
    assert outcome.err == ""


def test_progress_goes_to_standard_error(run, options):
    outcome = run(*[option for option in options if option != "--quiet"], "--json")
    json.loads(outcome.out)
    assert "teacher" in outcome.err
    assert "tok/s" in outcome.err


def test_every_option_of_dump_teacher_reaches_the_cache(run, options, tmp_path):
    more = ["--hidden-states", "last,1", "--hidden-codec", "fp16", "--codec", "exact", "--pack", "--dtype", "bfloat16"]
    parse(run(*options, *more, "--limit-documents", 5, "--task", "causal-lm", "--batch-tokens", 50, "--json"))
    manifest = open_cache(str(tmp_path / "cache")).manifest
    assert manifest.hidden_layers == ("hidden-1", "hidden-2")
    assert manifest.field("hidden-1").codec == {"name": "fp16"}
    assert manifest.field("targets").codec["name"] == "exact"
    assert manifest.sequences["packing"] == "window"
    assert manifest.sequences["max_length"] == 16
    assert manifest.corpus.num_documents == 5
    assert manifest.teacher.dtype == "bfloat16"
    assert verify_cache(str(tmp_path / "cache"), deep=True).problems == []


def test_settings_from_a_file_options_and_set(run, tmp_path, teacher_dir, corpus_file):
    file = tmp_path / "dump.yaml"
    file.write_text(
        f"teacher: {{model: {teacher_dir}, device: cpu}}\ncorpus: {{paths: [{corpus_file}]}}\noutput: nowhere\n"
        "targets: {top_k: 3, codec: exact}\nsequences: {max_length: 8}\n"
    )
    output = tmp_path / "cache"
    more = ["--output", output, "--top-k", 5, "--set", "targets.top_k=7", "--set", "targets.codec={name: compact}"]
    parse(run("dump-teacher", "--config", file, *more, "--quiet", "--json"))
    manifest = open_cache(str(output)).manifest
    assert manifest.top_k == 7  # --set over options over the file
    assert manifest.sequences["max_length"] == 8
    assert manifest.field("targets").codec["name"] == "compact"


def test_a_dry_run(run, options, tmp_path):
    result = parse(run(*options, "--dry-run", "--json"))
    assert not (tmp_path / "cache").exists()
    assert result["num_documents"] == 10
    assert result["num_shards_committed"] == 0
    assert {"bytes_per_token", "total_bytes", "tokens_per_s", "eta_s", "kept_mass", "teacher_loss"} < set(result)
    people = run(*options, "--dry-run")
    assert "Nothing was written" in people.out
    assert f"{result['num_positions']:,}" in people.out


def test_inspect(run, dumped):
    result = parse(run("inspect", dumped, "--json"))
    cache = open_cache(str(dumped))
    assert result["fingerprint"] == cache.fingerprint
    assert result["totals"]["num_bytes"] == cache.manifest.num_bytes
    files = [path for path in dumped.rglob("*") if path.is_file()]
    assert result["totals"]["folder_bytes"] == sum(path.stat().st_size for path in files)
    assert result["totals"]["bytes_by_part"]["tokenizer"] == sum(
        path.stat().st_size for path in (dumped / "tokenizer").iterdir()
    )
    assert result["teacher"]["architecture"] == "LlamaForCausalLM"
    assert [field["name"] for field in result["fields"]] == ["tokens", "targets", "hidden-1", "hidden-2"]
    people = run("inspect", dumped).out
    for word in (
        cache.fingerprint,
        "LlamaForCausalLM",
        "shards, tokenizer ",
        "top 6",
        "hidden-2",
        "kept mass",
        "source",
    ):
        assert word in people


def test_inspect_leaves_out_what_the_teacher_did_not_give(run, tmp_path):
    record = TargetsRecord(top_k=4, scalars=(), tail="remainder")
    cache = SyntheticCache(record=record).write(tmp_path / "cache")
    out = run("inspect", cache).out
    assert "top 4, tail = 1 - kept mass, without gold_logprob and entropy" in out
    assert "\nkept mass" in out
    totals = parse(run("inspect", cache, "--json"))["totals"]
    for name in ("teacher_loss", "teacher_perplexity", "teacher_entropy"):
        assert totals[name] is None
    for words in ("teacher loss", "\nentropy", "top-1"):
        assert words not in out


def test_inspect_a_manifest_that_says_nothing_about_its_making(run, dumped, tmp_path):
    manifest = json.loads((dumped / "manifest.json").read_text())
    for provenance in ({}, {"versions": "old"}, {"created": None, "versions": {}}):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "provenance": provenance}))
        assert run("inspect", tmp_path).code == 0


def test_verify(run, dumped):
    result = parse(run("verify", dumped, "--deep", "--quiet", "--json"))
    assert result == {
        "path": str(dumped),
        "ok": True,
        "deep": True,
        "num_files": sum(path.is_file() and path.name != ".lock" for path in dumped.rglob("*")),
        "num_shards": open_cache(str(dumped)).manifest.num_shards,
        "num_sequences": len(open_cache(str(dumped))),
        "num_positions": open_cache(str(dumped)).manifest.num_positions,
        "num_objects": result["num_objects"],
        "num_bytes": open_cache(str(dumped)).manifest.num_bytes,
        "problems": [],
        "teacher": None,
    }
    assert "every byte is as written" in run("verify", dumped).out
    deep = run("verify", dumped, "--deep").out
    assert "bytes and content are as written" in deep
    assert f"Checked {result['num_files']} files" in deep
    assert f"checked {result['num_sequences']} sequences and {result['num_positions']:,} positions" in deep


def test_verify_against_the_teacher(run, dumped, teacher_dir):
    options = ["verify", dumped, "--against-teacher", 3, "--teacher", teacher_dir, "--device", "cpu", "--quiet"]
    result = parse(run(*options, "--json"))
    assert result["ok"]
    assert result["teacher"]["ok"]
    assert result["teacher"]["num_sequences"] == 3
    assert result["teacher"]["same_weights"]
    assert "same weights" in run(*options).out


@pytest.mark.parametrize(
    ("kind", "words", "no_words"),
    [("sampled", "Samples: mean surprise off by", "KL"), ("hidden", "Last hidden states: relative", "Samples")],
)
def test_verify_other_kinds_against_the_teacher(run, tmp_path, teacher_dir, corpus_file, kind, words, no_words):
    cache, common = tmp_path / "cache", ["--teacher", teacher_dir, "--device", "cpu", "--quiet"]
    dump = ["dump-teacher", "--corpus", corpus_file, "--output", cache, "--max-length", 16, "--targets", kind]
    assert run(*dump, *common).code == 0
    outcome = run("verify", cache, "--against-teacher", 3, *common)
    assert outcome.code == 0
    assert words in outcome.out
    assert no_words not in outcome.out


def test_verify_says_what_is_wrong_and_fails(run, dumped, tmp_path):
    copy = shutil.copytree(dumped, tmp_path / "copy")
    [name] = [path.relative_to(copy) for path in (copy / "fields" / "hidden-1").glob("000001-*")]
    damaged = bytearray((copy / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copy / name).write_bytes(damaged)
    outcome = run("verify", copy, "--quiet")
    assert outcome.code == 1
    assert f"PROBLEM shard 1, field hidden-1: file {name} is damaged" in outcome.out
    assert "1 problem in" in outcome.out
    result = run("verify", copy, "--json", "--quiet")
    assert result.code == 1
    assert json.loads(result.out)["ok"] is False
    assert len(json.loads(result.out)["problems"]) == 1


def test_peek(run, dumped):
    result = parse(run("peek", dumped, "--sequence", 2, "--at", "0,3", "--top", 3, "--json"))
    batch = open_cache(str(dumped)).read([2])
    assert [position["position"] for position in result["positions"]] == [0, 3]
    for position in result["positions"]:
        row = position["position"]
        assert [choice["id"] for choice in position["top"]] == batch.targets.ids_PK[row, :3].tolist()
        assert position["gold"]["id"] == batch.tokens_T[row + 1]
        assert position["gold"]["probability"] == pytest.approx(np.exp(batch.targets.gold_logprob_P[row]))
        assert position["tail"] == pytest.approx(np.exp(batch.targets.log_tail_P[row]))
        assert position["entropy"] == pytest.approx(batch.targets.entropy_P[row])
    assert result["metadata"]["source"].startswith("page ")
    assert result["text"]


def dump_kind(run, tmp_path, teacher_dir, corpus_file, *options):
    common = ["--teacher", teacher_dir, "--device", "cpu", "--corpus", corpus_file, "--max-length", 16, "--quiet"]
    assert run("dump-teacher", *common, "--output", tmp_path / "cache", *options).code == 0
    return tmp_path / "cache"


def test_peek_shows_draws_after_kept_ids_and_as_draws(run, tmp_path, teacher_dir, corpus_file):
    options = ["--targets", "hybrid", "--top-k", 3, "--samples", 6]
    cache = dump_kind(run, tmp_path, teacher_dir, corpus_file, *options)
    result = parse(run("peek", cache, "--sequence", 2, "--at", "0,3,5", "--top", 9, "--json"))
    targets = open_cache(str(cache)).read([2]).targets
    for position in result["positions"]:
        row, top = position["position"], position["top"]
        assert [choice["id"] for choice in top[:3]] == targets.ids_PK[row].tolist()
        assert [choice["num_samples"] for choice in top[:3]] == [0, 0, 0]
        drawn = [choice["num_samples"] for choice in top[3:]]
        assert drawn == sorted(drawn, reverse=True)
        assert sum(drawn) == 6
        share = sum(choice["probability"] for choice in top[3:])
        assert share == pytest.approx(position["tail"], rel=1e-5)
    assert "(share of 1 sample)" in run("peek", cache, "--sequence", 2, "--at", "0,3,5", "--top", 9).out


def test_inspect_does_not_guess_the_favourite_from_draws(run, tmp_path, teacher_dir, corpus_file):
    cache = dump_kind(run, tmp_path, teacher_dir, corpus_file, "--targets", "sampled")
    assert parse(run("inspect", cache, "--json"))["totals"]["teacher_top1_accuracy"] is None
    assert "unknown: samples do not determine the top-1 id" in run("inspect", cache).out


@pytest.mark.parametrize("select", ["spread", "entropy", "loss"])
def test_peek_selects_positions(run, dumped, select):
    result = parse(run("peek", dumped, "--sequence", 2, "--select", select, "--count", 4, "--json"))
    chosen = [position["position"] for position in result["positions"]]
    assert len(chosen) == 4
    assert chosen == sorted(chosen)
    targets = open_cache(str(dumped)).read([2]).targets
    values = {"entropy": -targets.entropy_P, "loss": targets.gold_logprob_P}.get(select)
    if values is None:
        assert (chosen[0], chosen[-1]) == (0, targets.num_positions - 1)
    else:
        assert values[chosen].max() <= np.delete(values, chosen).min()


def test_peek_for_people(run, dumped):
    outcome = run("peek", dumped, "--sequence", 0, "--count", 3)
    assert outcome.code == 0
    assert "the cat sat on the mat" in outcome.out
    assert outcome.out.count("position ") >= 3
    assert "* " in outcome.out
    assert "tail" in outcome.out


def test_every_sequence_can_be_shown(run, dumped):
    for index in range(len(open_cache(str(dumped)))):  # also pieces of characters and emoji
        assert run("peek", dumped, "--sequence", index).code == 0


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ("student: {size: tiny}", ["--student-size", "nano"], {"steps": 2}),
        ("student: {model: nobody/nothing, revision: v1}", ["--student-size", "nano"], {"steps": 2}),
        ("student: {size: nano}\nepochs: 3", ["--max-steps", 7], {"steps": 7}),
        ("student: {size: nano}\nmax_steps: 7", ["--epochs", 3], {"steps": 6}),
        ("student: {size: nano}", ["--student", "TEACHER"], {"learning_rate": 3e-4}),
    ],
)
def test_an_option_wins_over_what_excludes_it_in_the_file(run, dumped, teacher_dir, tmp_path, file, options, expected):
    config = tmp_path / "train.yaml"
    sequences = -(-len(open_cache(str(dumped))) // 2)
    config.write_text(f"cache: {dumped}\noutput: {tmp_path / 'o'}\nbatch_sequences: {sequences}\n{file}\n")
    options = [teacher_dir if option == "TEACHER" else option for option in options]
    plan = parse(run("train-student", "--config", config, *options, "--dry-run", "--json", "--quiet"))
    assert {name: plan[name] for name in expected} == expected


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("1", False)])
def test_of_several_processes_one_prints_the_result(run, dumped, tmp_path, monkeypatch, rank, speaks):
    result = TrainResult(tmp_path / "o", steps=3, losses={"loss": 1.0}, seconds=1.0, tokens_per_s=9.0)
    monkeypatch.setattr("kdcache.train.train_student", lambda *arguments, **options: result)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    options = ["--cache", dumped, "--student-size", "nano", "--output", tmp_path / "o", "--json", "--quiet"]
    outcome = run("train-student", *options)
    assert outcome.code == 0
    assert (outcome.out != "") is speaks
