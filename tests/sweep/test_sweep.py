"""Sweeps from one tiny cache: what is checked beforehand, what is kept, and what a failure does to the others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from kdcache.errors import CacheError, ConfigError, StudentError
from kdcache.sweep import preview_sweep, sweep_students
from kdcache.sweep.pool import devices_of
from kdcache.train import TrainConfig, train_student

pytestmark = pytest.mark.usefixtures("preloaded_workers")

RUNS = [
    {"name": "ce", "set": {"objective.cross_entropy.weight": 1}},
    {"name": "wild", "set": {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_ratio": 0}},
    {"name": "kd", "set": {"objective.forward_kl.temperature": 2}},
]


@pytest.fixture(scope="module")
def swept(dumped, tmp_path_factory, preloaded_workers):
    """A finished sweep whose second student diverges."""
    from kdcache.config import build
    from kdcache.sweep import SweepConfig

    base = {"cache": str(dumped), "student": {"size": "nano"}, "max_steps": 3, "device": "cpu", "logging_steps": 1}
    settings = {"output": str(tmp_path_factory.mktemp("sweep") / "runs"), "held_out": str(dumped), "base": base}
    config = build(SweepConfig, {**settings, "runs": RUNS, "seeds": [0, 1]})
    return config, sweep_students(config, progress=False)


def test_students_are_those_of_train_student(swept, tmp_path):
    config, _ = swept
    run = next(run for run in preview_sweep(config).runs if run.name == "kd-seed1")
    alone = TrainConfig.model_validate({**run.variation.config.model_dump(), "output": str(tmp_path / "alone")})
    train_student(alone, progress=False)
    assert weights(tmp_path / "alone") == weights(Path(config.output) / "kd-seed1")
    assert weights(Path(config.output) / "kd-seed0") != weights(Path(config.output) / "kd-seed1")


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_a_student_that_diverges_stops_no_other(swept):
    _, result = swept
    assert [failure.name for failure in result.failures] == ["wild-seed0", "wild-seed1"]
    assert all("diverged" in failure.error and failure.traceback is None for failure in result.failures)
    assert [row.name for row in result.rows][-1] == "wild"
    assert {row.name: row.num_finished for row in result.rows} == {"ce": 2, "kd": 2, "wild": 0}
    assert "failed: wild-seed0" in result.table()


def test_the_table_is_sorted_by_quality_and_says_what_varies(swept):
    config, result = swept
    first, second, last = result.rows
    assert first.quality.mean <= second.quality.mean
    assert last.quality is None
    assert set(first.settings) >= {"objective.cross_entropy.weight", "learning_rate"}
    assert first.costs["num_parameters"].mean == 232_128
    assert first.held_out["loss"].half_width > 0
    assert first.held_out["kl"].mean >= 0
    page = (Path(config.output) / "table.md").read_text()
    assert page.startswith("| student |")
    for heading in ("parameters", "bytes", "seconds", "tokens/s", "held-out loss", "KL", "agreement", "ECE"):
        assert f"| {heading} |" in page
    assert "±" in page
    assert re.search(r"was trained on (\d+) of \1 sequences, so its numbers are not held out", page), (
        "the held-out cache of this test is no such thing"
    )


def test_what_is_written(swept):
    config, result = swept
    output = Path(config.output)
    written = json.loads((output / "sweep.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    statuses = {student["name"]: student["status"] for student in written["students"]}
    assert statuses["ce-seed0"] == "finished"
    assert statuses["wild-seed0"] == "failed"
    assert result.plot == output / "quality.png"
    assert result.plot.read_bytes().startswith(b"\x89PNG")


def test_finished_students_are_kept_and_variations_may_be_added(swept, monkeypatch, tmp_path):
    config, result = swept
    copy = config.model_copy(update={"output": str(tmp_path / "runs"), "seeds": (0,)})
    shutil.copytree(config.output, copy.output)
    runs = [run for run in config.runs if run.name != "wild"]
    before = {run.name: weights(Path(copy.output) / f"{run.name}-seed0") for run in runs}
    stamps = {
        run.name: (Path(copy.output) / f"{run.name}-seed0" / "model.safetensors").stat().st_mtime_ns for run in runs
    }
    more = copy.model_copy(update={"runs": (*runs, runs[0].model_copy(update={"name": "again"}))})
    states = {run.name: run.state for run in preview_sweep(more).runs}
    assert states == {"ce-seed0": "finished", "kd-seed0": "finished", "again-seed0": "new"}
    found = sweep_students(more, progress=False)
    assert found.failures == []
    for name, stamp in stamps.items():
        path = Path(copy.output) / f"{name}-seed0"
        assert weights(path) == before[name]
        assert (path / "model.safetensors").stat().st_mtime_ns == stamp
        assert found.outcomes[f"{name}-seed0"] == result.outcomes[f"{name}-seed0"]
    assert weights(Path(copy.output) / "again-seed0") == before["ce"]


def test_a_file_that_contradicts_a_finished_run_is_refused_by_name(swept):
    config, _ = swept
    changed = config.model_copy(update={"base": {**config.base, "weight_decay": 0.5}})
    with pytest.raises(
        ConfigError, match=r"variation ce-seed0: .*finished with other.*weight_decay was 0.01 and is 0.5"
    ):
        sweep_students(changed, progress=False)


def test_without_a_held_out_cache_the_table_says_so(make):
    result = sweep_students(make(), progress=False)
    assert "no held_out cache was given" in result.table()
    assert result.rows[0].quality == result.rows[0].losses["loss"]
    assert "held-out loss" not in result.table()
    assert "± " not in result.table()


def test_without_the_held_out_cache_of_before_only_training_losses_are_ranked(swept, tmp_path):
    config, _ = swept
    copy = config.model_copy(
        update={"output": str(tmp_path / "runs"), "seeds": (0,), "held_out": None, "runs": config.runs[::2]}
    )
    shutil.copytree(config.output, copy.output)
    result = sweep_students(copy, progress=False)
    assert result.failures == []
    for row in result.rows:
        assert row.quality == row.losses["loss"]
    assert "held-out loss" not in result.table()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": {"cache": "nowhere"}}, CacheError, "nowhere"),
        ({"held_out": "nowhere"}, CacheError, "nowhere"),
        (
            {"runs": [{"name": "a", "set": {"student": {"model": "nowhere", "size": None}}}]},
            StudentError,
            "variation a:",
        ),
        ({"grid": {"objective.forward_kl.mode": ["full"]}}, ConfigError, "variation mode=full:"),
        ({"grid": {"where": ["teacher_los < 5"]}}, ConfigError, "teacher_loss"),
        ({"base": {"report_to": "tensorbord"}}, ConfigError, "tensorboard"),
    ],
)
def test_mistakes_are_found_before_the_first_student_trains(make, changes, error, message):
    config = make(**changes)
    with pytest.raises(error, match=message):
        sweep_students(config, progress=False)
    assert not Path(config.output).exists()


def test_a_directory_that_is_no_run_is_refused(make):
    config = make()
    (Path(config.output) / "base").mkdir(parents=True)
    (Path(config.output) / "base" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"variation base: .*thesis\.txt"):
        sweep_students(config, progress=False)


def test_an_output_that_is_something_else_is_refused(make, dumped, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a directory for the students"):
        preview_sweep(make(output=str(tmp_path / "file")))
    with pytest.raises(ConfigError, match=r"holds a cache or a model \(found manifest.json\)"):
        preview_sweep(make(output=str(dumped)))


@pytest.fixture
def start(tmp_path):
    """Start a sweep in a process of its own; whatever of it still runs ends with the test, also with one that fails."""
    started = []

    def start(config) -> subprocess.Popen:
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        command = [sys.executable, "-m", "kdcache", "sweep", str(file), "--quiet"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A group of processes of its own, with those that train.
        started.append(subprocess.Popen(command, **pipes, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_others_go_on(make, start, tmp_path):
    """A student of which each step takes long is killed in the middle; its place is taken by the next."""
    config = make(runs=[{"name": "long", "set": {"max_steps": 100_000}}, {"name": "short"}], base={"save_steps": 5})
    process = start(config)
    kill_trainer_of(process, Path(config.output) / "long" / "checkpoint-5")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "failed: long: its process was killed by SIGKILL" in out
    assert "failed: short" not in out
    assert (Path(config.output) / "short" / "model.safetensors").exists()
    assert "Traceback" not in err


@pytest.mark.slow
def test_after_kill_9_of_the_sweep_students_go_on_from_their_checkpoints(make, start, tmp_path):
    config = make(runs=[{"name": "first"}, {"name": "second", "set": {"max_steps": 60}}], base={"save_steps": 5})
    process = start(config)
    wait_for(Path(config.output) / "second" / "checkpoint-5")
    children = children_of(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert children
    wait_until(lambda: not any(alive(child) for child in children))
    states = {run.name: run.state for run in preview_sweep(config).runs}
    assert states == {"first": "finished", "second": "begun"}
    stamp = (Path(config.output) / "first" / "model.safetensors").stat().st_mtime_ns
    assert sweep_students(config, progress=False).failures == []
    assert (Path(config.output) / "first" / "model.safetensors").stat().st_mtime_ns == stamp
    alone = preview_sweep(config).runs[1].variation.config.model_copy(update={"output": str(tmp_path / "alone")})
    train_student(alone, progress=False)
    assert weights(Path(config.output) / "second") == weights(tmp_path / "alone")


@pytest.mark.slow
def test_another_sweep_is_kept_out_and_an_interrupt_ends_the_children(make, start):
    config = make(base={"max_steps": 100_000, "save_steps": 5})
    process = start(config)
    wait_for(Path(config.output) / "base" / "checkpoint-5")
    children = children_of(process.pid)
    with pytest.raises(ConfigError, match="another sweep is running"):
        sweep_students(config, progress=False)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not any(alive(child) for child in children)


def test_devices_of_jobs(monkeypatch):
    assert devices_of(None, on_gpu=False) == [None]
    assert devices_of(3, on_gpu=False) == [None] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert devices_of(None, on_gpu=True) == ["2", "5"]
    assert devices_of(3, on_gpu=True) == ["2", "5", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of(1, on_gpu=True) == ["0"]


def wait_until(condition, seconds: float = 60) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def wait_for(checkpoint: Path) -> None:
    wait_until((checkpoint / "trainer_state.json").exists)


def children_of(pid: int) -> list[int]:
    """The processes that train; the one that keeps track of semaphores is none of them."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def kill_trainer_of(process: subprocess.Popen, checkpoint: Path) -> None:
    wait_for(checkpoint)
    (trainer,) = children_of(process.pid)
    os.kill(trainer, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
