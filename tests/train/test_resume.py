"""Runs that are killed, and that go on elsewhere: what they end with is what one run would have ended with.

As a script (``python -m tests.train.test_resume settings.json STEP``) it trains, and kills itself after a step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import relative_difference, settings, train, train_distributed

TOKENIZER = bpe_tokenizer()
ROOT = Path(__file__).parents[2]
#: 19 sequences in steps of 4: 5 steps an epoch, the last one of 3.
LENGTH = {"max_steps": 9, "save_steps": 2, "learning_rate": 1e-2, "schedule": "cosine", "max_grad_norm": 1.0}


class Kill(TrainerCallback):
    """End the process as a power cut would, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Interrupt(Kill):
    """End the run after a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    sequences = random_sequences(19, len(TOKENIZER), seed=1)
    folder = tmp_path_factory.mktemp("cache") / "c"
    return make_cache(folder, llama(len(TOKENIZER), seed=5), TOKENIZER, sequences, top_k=8, num_shards=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    output = tmp_path_factory.mktemp("whole") / "run"
    train(settings(cache, output, batch_sequences=2, gradient_accumulation=2, **LENGTH))
    return output


def weights(output):
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def killed_after(step, values, folder, python):
    """Train in a process of its own, from the newest checkpoint on, which dies after ``step``."""
    (folder / "settings.json").write_text(json.dumps(values))
    command = [python, "-m", "tests.train.test_resume", str(folder / "settings.json"), str(step)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr


def test_a_run_that_was_killed_twice_ends_with_the_same_bits(tmp_path, cache, whole, preloaded):
    values = settings(cache, tmp_path / "run", batch_sequences=2, gradient_accumulation=2, **LENGTH)
    killed_after(3, values, tmp_path, preloaded)  # goes on after step 2, inside the first epoch
    killed_after(8, values, tmp_path, preloaded)  # in the second epoch, right after its checkpoint
    assert train(values, resume=True).steps == 9
    expected, found = weights(whole), weights(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    histories = [json.loads((path / "kdcache_run.json").read_text())["history"] for path in (whole, tmp_path / "run")]
    for a, b in zip(*histories, strict=True):
        assert [a[name] for name in ("loss", "epoch", "step")] == [b[name] for name in ("loss", "epoch", "step")]


@pytest.mark.parametrize("interrupted", [pytest.param(3, marks=pytest.mark.slow), 5])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, cache, whole, interrupted, preloaded):
    one = settings(cache, tmp_path / "run", batch_sequences=2, gradient_accumulation=2, **LENGTH)
    with pytest.raises(KeyboardInterrupt):
        train(one, callbacks=[Interrupt(interrupted)])
    # After step 2 or 4, in the first epoch, on two processes of two sequences each.
    two = settings(cache, tmp_path / "run", batch_sequences=2, gradient_accumulation=1, **LENGTH)
    recorded = train_distributed({"run": two}, tmp_path, preloaded)["run"]
    assert len(recorded["gradients"]) == 9 - (interrupted - 1) // 2 * 2
    assert relative_difference(weights(tmp_path / "run"), weights(whole)) <= 1e-5


@pytest.mark.slow
def test_a_run_of_several_processes_goes_on_with_one_on_batches_of_another_size(tmp_path, cache, whole, preloaded):
    values = settings(cache, tmp_path / "run", batch_sequences=1, gradient_accumulation=2, **LENGTH)
    train_distributed({"run": values}, tmp_path, preloaded)
    two_processes = weights(tmp_path / "run")
    assert relative_difference(two_processes, weights(whole)) <= 1e-5
    # As if it had been lost after the checkpoint of step 8.
    for name in ("model.safetensors", "checkpoint-9"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    record = tmp_path / "run" / "kdcache_run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "running"}))
    train(settings(cache, tmp_path / "run", batch_sequences=4, gradient_accumulation=1, **LENGTH), resume=True)
    assert relative_difference(weights(tmp_path / "run"), two_processes) <= 1e-5


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(json.loads(Path(sys.argv[1]).read_text()), resume=True, callbacks=[Kill(int(sys.argv[2]))])
