"""A student that has diverged is never updated further and never saved, and every step learns something."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.optimization import get_scheduler

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.errors import ConfigError, StudentError
from kdcache.train import Distiller, TrainConfig, preview_training
from kdcache.train.checkpoints import Checkpoints
from kdcache.train.prepare import share_standing_still
from kdcache.train.trainer import learning_rate_share
from tests.loops import loop
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import Recorder, settings, train

TOKENIZER = bpe_tokenizer()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    sequences = [*random_sequences(14, 290, seed=1), *(sequence[:2] for sequence in random_sequences(6, 290, seed=2))]
    return make_cache(tmp_path_factory.mktemp("cache") / "c", llama(290, seed=5), TOKENIZER, sequences, num_shards=1)


def poisoned(step, value):
    """A module whose loss is ``value`` from the ``step``-th forward of training on."""

    class Poisoned(Distiller):
        calls = 0

        def forward(self, *batch):
            loss, *rest = super().forward(*batch)
            self.calls += self.training
            return (loss * value if self.calls >= step else loss), *rest

    return Poisoned


class Spoil(TrainerCallback):
    """Make a weight NaN after the update of a step, as an overflow in the optimiser would."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.change(model.model)


def finite(path):
    return all(bool(value.isfinite().all()) for value in load_file(path / "model.safetensors").values())


@loop("value", [math.nan, math.inf])
@loop("max_grad_norm", [0.0, 1.0])
def test_no_update_is_made_with_a_loss_that_is_not_finite(tmp_path, cache, value, max_grad_norm):
    output = tmp_path / f"{value}-{max_grad_norm}"
    recorder = Recorder()
    changes = {"max_steps": 9, "save_steps": 2, "save_total_limit": 1, "logging_steps": 100}
    values = settings(cache, output, max_grad_norm=max_grad_norm, **changes)
    words = (
        rf"diverged: the loss at step 4 is {value} and the norm of its gradient .*saved is in .*checkpoint-2\..*lower"
    )
    with pytest.raises(StudentError, match=words):
        train(values, module=poisoned(4, value), callbacks=[recorder])
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert finite(output / "checkpoint-2")
    assert not (output / "model.safetensors").exists()
    assert json.loads((output / "kdcache_run.json").read_text())["status"] == "running"


def nan_weight(model):
    model.model.norm.weight.data[0] = math.nan


def huge_weights(model):
    model.model.norm.weight.data.fill_(3e38)  # finite, but no product with it is


@loop("change", [nan_weight, huge_weights])
@loop("step", [2, 3])
def test_a_student_that_the_last_update_has_spoilt_is_not_saved(tmp_path, cache, change, step):
    # Step 2 is that of a checkpoint, 3 the last one: no later gradient tells.
    output = tmp_path / f"{change.__name__}-{step}"
    values = settings(cache, output, max_steps=3, save_steps=1, save_total_limit=1, logging_steps=100)
    what = {
        nan_weight: r"its weights are NaN or infinite \(in model.norm.weight\)",
        huge_weights: "the loss is (nan|inf)",
    }
    with pytest.raises(StudentError, match=rf"has diverged: .*{what[change]}.*checkpoint-{step - 1}"):
        train(values, callbacks=[Spoil(step, change)])
    assert Checkpoints(output).newest() == output / f"checkpoint-{step - 1}"
    assert finite(output / f"checkpoint-{step - 1}")
    assert not (output / "model.safetensors").exists()


def test_looking_at_the_student_changes_nothing(tmp_path, cache):
    for name, save_steps in (("often", 1), ("once", 100)):
        train(settings(cache, tmp_path / name, max_steps=5, save_steps=save_steps, learning_rate=1e-2))
    often, once = (load_file(tmp_path / name / "model.safetensors") for name in ("often", "once"))
    assert all(torch.equal(often[name], value) for name, value in once.items())


# ---------------------------------------------------------------------------------------------- learning rates


@loop("warmup_steps, num_steps", [(0, 1), (1, 1), (1, 20), (3, 20), (20, 20), (0, 7)])
@loop("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_every_step_has_a_positive_learning_rate(schedule, warmup_steps, num_steps):
    shares = [
        learning_rate_share(step, schedule=schedule, warmup_steps=warmup_steps, num_steps=num_steps)
        for step in range(num_steps)
    ]
    assert min(shares) > 0
    assert max(shares) == 1
    rise = shares[:warmup_steps]
    assert rise == pytest.approx([(step + 1) / warmup_steps for step in range(warmup_steps)])
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimiser, warmup_steps, num_steps)
    for step in range(num_steps):
        if step >= warmup_steps:
            assert shares[step] == scheduler.get_last_lr()[0], "to the bit"
        optimiser.step()
        scheduler.step()


@loop("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_a_run_of_one_step_learns(tmp_path, cache, schedule):
    recorder = Recorder()
    values = settings(cache, tmp_path / schedule, max_steps=1, schedule=schedule, warmup_ratio=0.05, learning_rate=0.1)
    train(values, callbacks=[recorder])
    saved = load_file(tmp_path / schedule / "model.safetensors")
    before = recorder.weights[0]
    assert all(not torch.equal(value, before[name]) for name, value in saved.items() if name in before)
    [entry] = json.loads((tmp_path / schedule / "kdcache_run.json").read_text())["history"]
    assert entry["learning_rate"] == 0.1


# --------------------------------------------------------------------------------- updates that change nothing


@loop("dtype, rate, is_warned", [("bfloat16", 1e-5, True), ("bfloat16", 0.05, False), ("float32", 1e-5, False)])
def test_weights_that_stand_still_in_bfloat16_are_announced(tmp_path, cache, caplog, dtype, rate, is_warned):
    model = llama(290, seed=2)
    model.save_pretrained(tmp_path / "student")
    TOKENIZER.save_pretrained(tmp_path / "student")
    recorder = Recorder()
    student = {"model": str(tmp_path / "student"), "dtype": dtype}
    values = settings(cache, tmp_path / f"{dtype}-{rate}", student=student, max_steps=2, learning_rate=rate)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        preview_training(build(TrainConfig, values))
        train(values, callbacks=[recorder])
    said = [record.message for record in caplog.records if "stand still in a usual update" in record.message]
    assert len(said) == (2 if is_warned else 0)
    before, after, gradient = recorder.weights[0], recorder.weights[1], recorder.gradients[0]
    moved = {name: gradient[name] != 0 for name in before}
    still = sum(int((after[name] == before[name])[moved[name]].sum()) for name in before)
    share = still / sum(int(moved[name].sum()) for name in before)
    parameters = [torch.nn.Parameter(value[moved[name]]) for name, value in before.items()]
    assert share_standing_still(parameters, rate) == pytest.approx(share, abs=0.02), "what the update did"
    assert (share > 0.5) is is_warned


def test_nothing_to_learn_from(tmp_path, cache):
    opened = open_cache(str(cache))
    assert 0 < len(opened.where("num_targets == 0")) < len(opened)
    values = settings(cache, tmp_path / "run", where="num_targets == 0")
    for start in (train, lambda values: preview_training(build(TrainConfig, values))):
        with pytest.raises(ConfigError, match=r"nothing to learn: none of the \d sequences .* change where"):
            start(values)
    assert not (tmp_path / "run").exists()
    only = [sequence[:2] for sequence in random_sequences(1, 290)]
    empty = make_cache(tmp_path / "empty", llama(290, seed=5), TOKENIZER, only, num_shards=1)
    with pytest.raises(ConfigError, match=r"none of the 1 sequences .*loss masks are 0"):
        train(settings(empty, tmp_path / "run"))
