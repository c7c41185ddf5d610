"""Checkpoints are complete or not used, and the same command resumes a run, whatever ended it."""

from __future__ import annotations

import contextlib
import logging
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from kdcache.config import build
from kdcache.errors import ConfigError, StudentError
from kdcache.evaluate import evaluate_students
from kdcache.train import TrainConfig, train_student
from kdcache.train.checkpoints import CHECKPOINT_FILE, Checkpoints
from kdcache.train.run_record import OutputLock
from tests.loops import loop
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import settings

TOKENIZER = bpe_tokenizer()
LENGTH = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "schedule": "cosine", "warmup_ratio": 0.3}


class Interrupt(TrainerCallback):
    """End the run after a step."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


def train(values, *callbacks, **options):
    return train_student(build(TrainConfig, values), progress=False, callbacks=callbacks, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    return make_cache(folder, llama(290, seed=5), TOKENIZER, random_sequences(19, 290, seed=1))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student of 40 kB."""
    path = tmp_path_factory.mktemp("student") / "s"
    llama(290, seed=2).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return {"model": str(path)}


@pytest.fixture(scope="module")
def begun(tmp_path_factory, cache, student):
    """A run that ended after step 5, with checkpoints of the steps 2 and 4, and what all of it would have given."""
    folder = tmp_path_factory.mktemp("begun")
    train(settings(cache, folder / "whole", student=student, **LENGTH))
    with pytest.raises(KeyboardInterrupt):
        train(settings(cache, folder / "part", student=student, **LENGTH), Interrupt(5))
    return folder / "part", load_file(folder / "whole" / "model.safetensors")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def remove(path):
    path.unlink()


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json", CHECKPOINT_FILE)
DAMAGES = [*((name, cut) for name in FILES), *((name, remove) for name in ("optimizer.pt", CHECKPOINT_FILE))]


@loop("name, damage", [*DAMAGES, ("optimizer.pt", flip)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path, cache, student, begun, caplog, name, damage
):
    output = tmp_path / f"{name}-{damage.__name__}"
    shutil.copytree(begun[0], output)
    damage(output / "checkpoint-4" / name)
    caplog.clear()
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    with caplog.at_level(logging.WARNING):
        train(settings(cache, output, student=student, **LENGTH), Count())
    [warning] = [record.message for record in caplog.records if "cannot be used" in record.message]
    assert "checkpoint-4" in warning
    assert name in warning
    assert "resumes from" in warning
    assert "checkpoint-2" in warning
    assert steps == [3, 4, 5, 6]
    found = load_file(output / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in begun[1].items()), "to the bit"
    assert {path.name for path in output.glob("*checkpoint*")} == {"checkpoint-4", "checkpoint-6"}
    assert Checkpoints(output).newest() == output / "checkpoint-6"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path, cache, student, begun):
    shutil.copytree(begun[0], tmp_path / "out")
    cut(tmp_path / "out" / "checkpoint-4" / "optimizer.pt")
    remove(tmp_path / "out" / "checkpoint-2" / "rng_state.pth")
    with pytest.raises(
        StudentError, match=r"checkpoint-4 .*optimizer.pt has .*checkpoint-2 .*rng_state.pth is missing"
    ):
        train(settings(cache, tmp_path / "out", student=student, **LENGTH))


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path, cache, student, begun):
    shutil.copytree(begun[0], tmp_path / "out")
    cut(tmp_path / "out" / "checkpoint-4" / "optimizer.pt")
    changes = {**LENGTH, "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(KeyboardInterrupt):
        train(settings(cache, tmp_path / "out", student=student, **changes), Interrupt(4))
    assert Checkpoints(tmp_path / "out").newest() == tmp_path / "out" / "checkpoint-3"


def test_older_checkpoints_go_also_when_a_process_was_killed_before_it_removed_them(tmp_path, cache, student, begun):
    shutil.copytree(begun[0], tmp_path / "out")
    values = settings(cache, tmp_path / "out", student=student, **LENGTH)
    with pytest.raises(KeyboardInterrupt):
        train(values | {"save_total_limit": 3}, Interrupt(6, KeyboardInterrupt))
    shutil.copytree(tmp_path / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-3")
    train(values | {"save_total_limit": 1})
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-6"}
    assert not (tmp_path / "out" / ".partial").exists()


def test_the_same_command_resumes_and_a_finished_run_gives_its_result_again(tmp_path, cache, student, begun):
    shutil.copytree(begun[0], tmp_path / "out")
    values = settings(cache, tmp_path / "out", student=student, **LENGTH)
    result = train(values)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in begun[1].items())
    assert train(values, Interrupt(1)) == result, "no step is made"
    with pytest.raises(ConfigError, match=r"other settings: learning_rate was 0.01 and is 0.5"):
        train({**values, "learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"already holds a run"):
        train(values, resume=False)


@loop("name", [".lock", "kdcache_run.json.tmp", ".partial"])
def test_what_a_process_leaves_that_is_killed_at_the_beginning(tmp_path, cache, student, name):
    output = tmp_path / name.replace(".", "")
    output.mkdir()
    if name == ".partial":
        (output / name / "checkpoint-1").mkdir(parents=True)
    else:
        (output / name).write_text("{")
    train(settings(cache, output, student=student, max_steps=1))
    assert not (output / ".partial").exists()
    assert not (output / "kdcache_run.json.tmp").exists()


def test_one_process_at_a_time_trains_into_an_output(tmp_path, cache, student):
    values = settings(cache, tmp_path / "out", student=student, max_steps=2)
    refused = []

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with pytest.raises(ConfigError, match=r"another process is training into .*out; wait for it, or choose"):
                train(values)
            refused.append(state.global_step)

    train(values, Second())
    assert refused == [0, 1]
    train(values)  # the right was given back
    with OutputLock(tmp_path / "out"), pytest.raises(ConfigError, match="another process is training into"):
        train(values)


def test_an_unfinished_run_is_no_student(tmp_path, cache, student, begun):
    shutil.copytree(begun[0], tmp_path / "out")
    with pytest.raises(StudentError, match=r"has not finished; run its command again, .*, or take .*checkpoint-4"):
        evaluate_students(str(cache), [str(tmp_path / "out")], device="cpu", progress=False)
    with pytest.raises(StudentError, match=r"has not finished"):
        train(settings(cache, tmp_path / "next", student={"model": str(tmp_path / "out")}))
    result = evaluate_students(str(cache), [str(tmp_path / "out" / "checkpoint-4")], device="cpu", progress=False)
    assert result.students[0].loss > 0


# -------------------------------------------------------------------------------------------- a full disk


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """As on a full disk: what is longer cannot be written."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@loop("num_bytes, name", [(30_000, "model.safetensors"), (70_000, "optimizer.pt")])
def test_a_full_disk_is_one_message_and_the_run_resumes_when_there_is_room(
    tmp_path, cache, student, begun, num_bytes, name
):
    values = settings(cache, tmp_path / name, student=student, **LENGTH)
    shutil.copytree(begun[0], tmp_path / name)
    shutil.rmtree(tmp_path / name / "checkpoint-4")
    words = (
        rf"cannot write .*{name}/checkpoint-4/{name}: .+\. Make room, and the same command resumes from checkpoint-2"
    )
    with files_of_at_most(num_bytes), pytest.raises(StudentError, match=words):
        train(values)
    assert {path.name for path in (tmp_path / name).glob("*checkpoint*")} == {"checkpoint-2"}
    assert not (tmp_path / name / ".partial").exists(), "it would take room"
    train(values)
    found = load_file(tmp_path / name / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in begun[1].items())


def test_a_full_disk_at_the_end_of_a_run(tmp_path, cache, student, begun, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "model.safetensors"))

    values = settings(cache, tmp_path / "out", student=student, **LENGTH)
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.train.run.save_student", full)
        with pytest.raises(StudentError, match=r"model.safetensors: No space left on device. Make room, and the same"):
            train(values)
    train(values, Interrupt(1))  # no step is made: the last checkpoint is that of the last step
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in begun[1].items())
