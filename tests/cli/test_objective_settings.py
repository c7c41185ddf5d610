"""Schedules and selections as settings of the command line."""

from __future__ import annotations

import json

import pytest

WEIGHT = "objective.forward_kl.weight"


@pytest.fixture
def train(run, dumped, tmp_path):
    """Run train-student on the dumped cache with some settings."""

    def train_with(*assignments):
        options = ["--cache", dumped, "--student-size", "nano", "--output", tmp_path / "out", "--device", "cpu"]
        options += ["--max-steps", 2, "--batch-sequences", 4, "--quiet"]
        return run("train-student", *options, *(part for item in assignments for part in ("--set", item)))

    return train_with


def test_schedules_and_selections_are_settings(train, tmp_path):
    assignments = [f"{WEIGHT}.schedule=linear", f"{WEIGHT}.start=0.9", f"{WEIGHT}.end=0.1"]
    result = train(*assignments, "objective.forward_kl.select={by: teacher_loss, bottom: 0.5}")
    assert result.code == 0, result.err
    recorded = json.loads((tmp_path / "out" / "kdcache_run.json").read_text())["config"]["objective"]["forward_kl"]
    assert recorded["weight"] == {"schedule": "linear", "start": 0.9, "end": 0.1, "begin": 0.0, "until": 1.0}
    assert recorded["select"] == {"by": "teacher_loss", "min": None, "max": None, "top": None, "bottom": 0.5}


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        ([f"{WEIGHT}.schedule=liner"], "did you mean 'linear'?"),
        ([f"{WEIGHT}={{schedule: linear, start: 1, end: -1}}"], f"{WEIGHT}.end"),
        (["objective.forward_kl.select={by: entropy, top: 0.5}"], "did you mean 'teacher_entropy'?"),
        (
            [
                "objective.forward_kl.temperature={schedule: linear, start: 1, end: 2}",
                "objective.forward_kl.tail=uniform",
            ],
            "reached by a schedule",
        ),
    ],
)
def test_mistakes_are_told_in_one_message(train, tmp_path, assignments, words):
    assert words in train(*assignments).message()
    assert not (tmp_path / "out").exists()
