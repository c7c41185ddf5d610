from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kdcache.cache import open_cache
from kdcache.presets import PRESETS
from kdcache.tasks import task_of
from tests.cli.conftest import Run
from tests.task_models import TINY_TASKS


@pytest.fixture
def arguments(teacher_dir: Path, corpus_file: Path) -> list[object]:
    return ["estimate", "--teacher", teacher_dir, "--corpus", corpus_file, "--max-length", 16, "--device", "cpu"]


def test_a_table_of_every_preset_and_what_students_may_choose(run: Run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run(*arguments, "--quiet")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "10 documents, 383 positions, all of them measured" in lines[0]
    table, choices = outcome.out.split("What a student may use")
    for name in PRESETS:
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
        assert float(line.split()[1]) > 0
    assert "lm_head.safetensors" in table
    assert "forward_kl: tail bucket, prior, uniform" in choices
    assert "\nsampled\n  forward_kl: tail bucket; temperature 1\n" in choices
    assert "  reverse_kl, jensen_shannon, total_variation, skew_kl, skew_reverse_kl: no: it needs the prob" in choices
    hybrid = choices.split("\nhybrid, hybrid-16\n")[1]
    assert hybrid.startswith("  forward_kl: tail bucket; temperature 1\n  cross_entropy, logits_mse, ranking: yes\n")
    assert "any (full)" in choices
    assert "Nothing was written" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_some_presets_as_json(run: Run, arguments):
    outcome = run(*arguments, "--preset", "compact", "--preset", "hybrid", "--positions", 50, "--json", "-q")
    found = json.loads(outcome.out)
    assert [row["name"] for row in found["presets"]] == ["compact", "hybrid"]
    assert 30 < found["pilot_positions"] < 100 < found["num_positions"]
    assert found["presets"][0]["measurement"]["bytes_per_token"] > 0
    assert outcome.err == ""


def test_a_preset_that_the_teacher_does_not_allow(run: Run, arguments, monkeypatch):
    monkeypatch.setattr("kdcache.models.bodies.split_model", lambda model: None)
    outcome = run(*arguments, "--preset", "hidden", "--preset", "sampled", "-q")
    assert outcome.code == 0
    assert "hidden is not available: the logits of" in outcome.out
    assert "sampled" in outcome.out
    alone = run(*arguments, "--preset", "hidden", "-q")
    assert alone.code == 0
    assert "hidden is not available" in alone.out


def test_progress_is_shown_unless_quiet(run: Run, arguments):
    assert "measure" in run(*arguments, "--preset", "compact").err
    assert run(*arguments, "--preset", "compact", "--quiet").err == ""


def test_settings_of_a_file_for_dumps(run: Run, arguments, tmp_path):
    file = tmp_path / "dump.yaml"
    file.write_text("output: somewhere\nsequences: {max_length: 8}\ntargets: {top_k: 3}\n")
    outcome = run(*arguments[:5], "--device", "cpu", "--config", file, "--preset", "compact", "-q", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["num_sequences"] > 27
    assert not (tmp_path / "somewhere").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "compct"], "unknown preset 'compct'; did you mean 'compact'?"),
        (["--positions", "0"], "at least one position, found 0"),
        (["--set", "sequences.max_lenth=4"], "unknown setting 'sequences.max_lenth'; did you mean 'max_length'?"),
        (["--corpus", "/no/such/file.txt"], "/no/such/file.txt"),
        (["--teacher", "/no/such/model"], "/no/such/model"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_mistakes(run: Run, arguments, options, words):
    assert words in run(*arguments, *options, "-q").message()


@pytest.mark.parametrize("missing", ["--teacher", "--corpus"])
def test_what_is_always_needed(run: Run, arguments, missing):
    place = arguments.index(missing)
    message = run(*arguments[:place], *arguments[place + 2 :], "-q").message()
    assert missing.removeprefix("--") in message


def test_nothing_is_printed_before_a_bad_option_is_noticed(run: Run, arguments):
    outcome = run(*arguments, "--top-k", 5)
    assert outcome.code == 2
    assert "No such option" in outcome.err


@pytest.mark.parametrize("task", TINY_TASKS)
def test_every_task(run: Run, task, tmp_path):
    """Of a task of tokens the sizes are those of a dump; of the others the message says what to use instead."""
    made = TINY_TASKS[task].write(tmp_path)
    settings = {
        "task": task,
        "teacher": {"model": made["teacher"], "device": "cpu"},
        "corpus": {"paths": [made["corpus"]]},
        "sequences": TINY_TASKS[task].settings,
        "batch_tokens": 64,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    names = ("sampled", "hybrid", "hidden")
    outcome = run("estimate", "--config", tmp_path / "config.yaml", *(f"--preset={name}" for name in names), "--json")
    if task_of(task).gives != "tokens":
        assert outcome.code == 1
        assert "kdcache dump-teacher --dry-run" in outcome.message()
        return
    assert outcome.code == 0, outcome.err
    assert "measure" in outcome.err
    found = {row["name"]: row for row in json.loads(outcome.out)["presets"]}
    for name in names:
        output = tmp_path / name
        run("dump-teacher", "--config", tmp_path / "config.yaml", "--preset", name, "--output", output, "-q")
        assert found[name]["total_bytes"] == pytest.approx(open_cache(str(output)).manifest.num_bytes, rel=0.01)
