"""``kdcache train-student``: interrupts and their advice, outputs that are elsewhere, and the line about memory."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from kdcache.train.checkpoints import Checkpoints


@pytest.fixture
def options(dumped, tmp_path):
    given = {"max_steps": 5, "save_steps": 2, "learning_rate": 0.01, "batch_sequences": 2}
    settings = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    return ["train-student", "--cache", dumped, "--student-size", "nano", "--device", "cpu", "--quiet", *settings]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_command_resumes_an_interrupted_run(run, options, tmp_path, monkeypatch, number):
    complete = Checkpoints.complete

    def interrupted(self, step):
        complete(self, step)
        if step == 4:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "complete", interrupted)
        stopped = run(*options, "--output", tmp_path / "run")
    assert stopped.code == 128 + number
    assert stopped.err.splitlines()[-1] == ("Interrupted. Finished work is kept; run the same command again to resume.")
    assert Checkpoints(tmp_path / "run").newest() == tmp_path / "run" / "checkpoint-4"
    assert run("evaluate", "--cache", options[2], "--student", tmp_path / "run", "--quiet").message() == (
        f"{tmp_path}/run is a training run that has not finished; run its command again, which resumes it, or take its "
        f"last checkpoint, {tmp_path}/run/checkpoint-4"
    )
    assert run(*options, "--output", tmp_path / "run", "--resume").code == 0, "--resume is accepted"
    assert run(*options, "--output", tmp_path / "whole").code == 0
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert run(*options, "--output", tmp_path / "run").out.startswith("Trained 5 steps"), "of a finished run: again"
    message = run(*options, "--output", tmp_path / "run", "--seed", 7).message()
    assert "other settings: seed was 0 and is 7" in message


def test_a_run_says_that_it_has_finished(run, options, tmp_path):
    options.remove("--quiet")
    assert run(*options, "--output", tmp_path / "run").code == 0
    again = run(*options, "--output", tmp_path / "run")
    assert f"{tmp_path}/run holds this run, finished: nothing is trained" in again.err


def test_an_output_elsewhere_is_refused_before_anything_is_loaded(run, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--dry-run"]):
        message = run(*options, "--output", "s3://bucket/run", *more).message()
        assert "'output': give a directory on this machine" in message
        assert "'s3://bucket/run'" in message
    assert not list(tmp_path.glob("s3*"))


def test_memory_names_what_comes_on_top(run, options, tmp_path):
    shown = run(*options, "--output", tmp_path / "run", "--dry-run").out
    [line] = [line for line in shown.splitlines() if line.startswith("besides")]
    assert line.endswith("of Python and its libraries, in memory already")
