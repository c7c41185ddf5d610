"""``kdcache sweep``: what it prints and how it ends."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("preloaded_workers")


@pytest.fixture
def file(dumped, tmp_path):
    base = {"cache": str(dumped), "student": {"size": "nano"}, "max_steps": 2, "device": "cpu", "save_steps": 100}
    settings = {
        "output": str(tmp_path / "runs"),
        "held_out": str(dumped),
        "base": base,
        "grid": {"objective.forward_kl.temperature": [1, 2]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def change(file, **changes):
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


def test_dry_run_lists_the_students_and_trains_nothing(run, file, tmp_path):
    outcome = run("sweep", file, "--dry-run")
    assert outcome.code == 0
    assert "temperature=2 (new)" in outcome.out
    assert "objective.forward_kl.temperature=2; objective 0.9 forward_kl + 0.1 cross_entropy" in outcome.out
    assert "232,128 parameters, 2 steps" in outcome.out
    assert "2 students, 4 steps" in outcome.out
    assert not (tmp_path / "runs").exists()
    plan = json.loads(run("sweep", file, "--dry-run", "--json").out)
    assert [item["name"] for item in plan["runs"]] == ["temperature=1", "temperature=2"]
    assert plan["steps"] == 4
    assert plan["num_positions"] == sum(item["num_positions"] for item in plan["runs"]) > 0


def test_a_sweep_and_its_repetition(run, file, tmp_path, monkeypatch):
    outcome = run("sweep", file, "--jobs", 1)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("student")
    assert "held-out loss of the teacher" in outcome.out
    assert f"The plot is {tmp_path / 'runs' / 'quality.png'}" in outcome.out
    assert "2/2 temperature=" in outcome.err
    assert "check: 100%" in outcome.err, "all students are loaded once before the first one trains"
    again = run("sweep", file, "--json", "--jobs", 2)
    assert "kept 2 of 2 students, finished before" in again.err
    result = json.loads(again.out)
    assert {student["status"] for student in result["students"]} == {"finished"}
    losses = [row["held_out"]["loss"]["mean"] for row in result["rows"]]
    assert losses == sorted(losses)
    assert result == json.loads((tmp_path / "runs" / "sweep.json").read_text())
    # Without matplotlib the table is there all the same.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    quiet = run("sweep", file, "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert "pip install 'kdcache[report]'" in quiet.out


def test_mistakes(run, file, tmp_path):
    change(file, grid={"objective.forward_kl.temprature": [1]})
    assert "did you mean 'temperature'" in run("sweep", file).message()
    change(file, gird={})
    assert f"{file}: unknown setting 'gird'; did you mean 'grid'" in run("sweep", file).message()
    assert "cannot read configuration file" in run("sweep", tmp_path / "none.yaml").message()


def test_a_launcher_is_refused(run, file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without a launcher" in run("sweep", file).message()
