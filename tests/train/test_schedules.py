"""Schedules and selections over whole runs: the trainer's progress, resuming, splitting, and what a share becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import kdcache.losses.from_cache
from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.errors import ConfigError
from kdcache.losses import ObjectiveConfig
from kdcache.losses.from_cache import resolve_selection
from kdcache.train import Distiller, TrainConfig, train_student
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import Recorder, relative_difference, settings, train

TOKENIZER = bpe_tokenizer()
VOCAB_SIZE = len(TOKENIZER)

SCHEDULED = {
    "forward_kl": {
        "weight": {"schedule": "wsd", "start": 0.0, "peak": 0.9, "end": 0.2, "warmup": 0.3, "decay": 0.3},
        "temperature": {"schedule": "cosine", "start": 3.0, "end": 1.0},
    },
    "cross_entropy": {"weight": {"schedule": "linear", "start": 1.0, "end": 0.1, "begin": 0.2}},
}
SELECTED = {
    "forward_kl": {**SCHEDULED["forward_kl"], "select": {"by": "teacher_entropy", "top": 0.4}},
    "cross_entropy": {**SCHEDULED["cross_entropy"], "select": {"by": "confidence", "bottom": 0.7}},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    # 19 = 2 steps of 8 and one of 3: fewer sequences than four micro-batches.
    sequences = random_sequences(19, VOCAB_SIZE, seed=1)
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", llama(VOCAB_SIZE, seed=5), TOKENIZER, sequences)


def history(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "kdcache_run.json").read_text())["history"]


# ------------------------------------------------------------------------------------------------------ progress


class Told(Distiller):
    """Keep every progress that the trainer tells, and at which of them every micro-batch is computed."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.told: list[float] = []
        self.used: list[float] = []

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        self.told.append(progress)

    def forward(self, *batch: Any) -> Any:
        self.used.append(self.objective.progress)
        return super().forward(*batch)


def told(values: dict[str, Any], **more: Any) -> Told:
    made = []

    def module(*parts: Any) -> Told:
        made.append(Told(*parts))
        return made[0]

    train_student(build(TrainConfig, values), progress=False, module=module, **more)
    return made[0]


def test_progress_is_told_before_every_step_and_not_for_every_micro_batch(tmp_path, cache):
    found = told(settings(cache, tmp_path / "out", max_steps=5, batch_sequences=2, gradient_accumulation=2))
    assert found.told == [0, 0.25, 0.5, 0.75, 1]
    *used, checked = found.used
    assert used == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]
    assert checked == 1, "before the student is saved: the last update may have been one too many"


def test_progress_of_a_resumed_run_goes_on_and_that_of_one_step_is_0(tmp_path, cache):
    values = settings(cache, tmp_path / "out", max_steps=5, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(values, callbacks=[Interrupt(3)])
    assert told(values, resume=True).told == [0.5, 0.75, 1]
    assert told(settings(cache, tmp_path / "one", max_steps=1)).told == [0]


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("interrupted", [3, 5])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, cache, interrupted):
    # 5 steps an epoch, checkpoints after 2, 4, ...: resumes inside an epoch and in the second one.
    values = {
        "max_steps": 7,
        "save_steps": 2,
        "batch_sequences": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
        "objective": SELECTED,
    }
    train(settings(cache, tmp_path / "whole", **values))
    part = settings(cache, tmp_path / "part", **values)
    with pytest.raises(KeyboardInterrupt):
        train(part, callbacks=[Interrupt(interrupted)])
    train(part, resume=True)
    expected, found = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = ("forward_kl", "forward_kl_weight", "forward_kl_temperature", "forward_kl_selected")
    whole, part_history = history(tmp_path / "whole"), history(tmp_path / "part")
    assert [[entry[name] for name in names] for entry in whole] == [[e[name] for name in names] for e in part_history]


def gradients(cache: Path, output: Path, **changes: Any) -> list[dict[str, torch.Tensor]]:
    recorder = Recorder()
    # Small steps: the runs are compared beyond the first update too, and must not drift by rounding.
    train(settings(cache, output, learning_rate=1e-6, **changes), callbacks=[recorder])
    return recorder.gradients


@pytest.mark.parametrize("objective", [SCHEDULED, SELECTED], ids=["schedules", "selections"])
def test_gradient_accumulation_does_not_change_the_gradient(tmp_path, cache, objective):
    whole = gradients(cache, tmp_path / "whole", objective=objective)
    for batch, accumulation in ((2, 4), (1, 8)):
        output = tmp_path / f"split-{accumulation}"
        split = gradients(cache, output, objective=objective, batch_sequences=batch, gradient_accumulation=accumulation)
        assert len(split) == len(whole) == 4
        for a, b in zip(split, whole, strict=True):
            assert relative_difference(a, b) < 2e-6, "and neither is 0, which would give NaN"


def test_history_shows_the_course_of_what_is_scheduled(tmp_path, cache):
    result = train(settings(cache, tmp_path / "out", max_steps=5, objective=SELECTED))
    entries = history(tmp_path / "out")
    config = build(ObjectiveConfig, SCHEDULED)
    for step, entry in enumerate(entries):
        progress = step / 4
        assert entry["forward_kl_weight"] == config.forward_kl.weight.at(progress)
        assert entry["forward_kl_temperature"] == config.forward_kl.temperature.at(progress)
        assert entry["cross_entropy_weight"] == config.cross_entropy.weight.at(progress)
        terms = sum(entry[name] * entry[f"{name}_weight"] for name in ("forward_kl", "cross_entropy"))
        assert entry["loss"] == pytest.approx(terms, rel=1e-5), "the terms add up to the loss"
        assert 0 < entry["forward_kl_selected"] < 1
    assert set(result.losses) == {"loss", "forward_kl", "cross_entropy"}


def test_a_step_whose_weights_are_all_0_has_no_gradient(tmp_path, cache):
    rising = {"schedule": "linear", "start": 0.0, "end": 1.0, "begin": 0.5}
    recorder = Recorder()
    values = settings(cache, tmp_path / "out", max_steps=5, objective={"forward_kl": {"weight": rising}})
    train(values, callbacks=[recorder])
    lengths = [sum(float(g.abs().sum()) for g in gradients.values()) for gradients in recorder.gradients]
    assert lengths[:3] == [0, 0, 0]
    assert min(lengths[3:]) > 0
    assert [entry["loss"] for entry in history(tmp_path / "out")][:3] == [0, 0, 0]


def test_resume_with_another_schedule_or_selection_is_refused(tmp_path, cache):
    values = settings(cache, tmp_path / "out", max_steps=1, objective=SELECTED)
    train(values)
    assert train(values, resume=True).steps == 1
    other = json.loads(json.dumps(SELECTED))
    other["forward_kl"]["weight"]["decay"] = 0.4
    with pytest.raises(ConfigError, match=r"cannot resume .* objective was .*'decay': 0\.3.* and is .*'decay': 0\.4"):
        train(values | {"objective": other}, resume=True)
    with pytest.raises(ConfigError, match=r"cannot resume .* objective was"):
        train(values | {"objective": SCHEDULED}, resume=True)


# ------------------------------------------------------------------------------------------------------ shares


def share_of(cache: Path, chosen: np.ndarray | None = None, **select: Any) -> Any:
    config = build(ObjectiveConfig, {"cross_entropy": {"weight": 1.0, "select": select}})
    return resolve_selection(config, open_cache(str(cache)), chosen).cross_entropy.select


def counted(cache: Path, chosen: Any) -> dict[str, np.ndarray]:
    batch = open_cache(str(cache)).read(chosen)
    valid = batch.loss_mask_P.astype(bool)
    targets = batch.targets
    values = {
        "teacher_entropy": targets.entropy_P,
        "teacher_loss": -targets.gold_logprob_P,
        "confidence": np.exp(targets.logprobs_PK[:, 0].astype(np.float64)),
    }
    return {name: value[valid] for name, value in values.items()}


@pytest.mark.parametrize("by", ["teacher_entropy", "teacher_loss", "confidence"])
@pytest.mark.parametrize("chosen", [None, np.array([17, 2, 3, 11])], ids=["all", "some"])
def test_a_share_is_one_of_the_positions_that_count(cache, by, chosen):
    values = np.sort(counted(cache, range(19) if chosen is None else chosen)[by])
    count = round(0.3 * len(values))
    top, bottom = share_of(cache, chosen, by=by, top=0.3), share_of(cache, chosen, by=by, bottom=0.3)
    assert top.min == pytest.approx(values[-count], rel=1e-12)
    assert bottom.max == pytest.approx(values[count - 1], rel=1e-12)
    assert (values >= top.min).sum() == (values <= bottom.max).sum() == count


def test_a_large_cache_is_sampled_always_in_the_same_way(tmp_path, monkeypatch):
    sequences = random_sequences(300, VOCAB_SIZE, seed=2)
    large = make_cache(tmp_path / "large", llama(VOCAB_SIZE, seed=5), TOKENIZER, sequences, num_shards=30)
    exact = share_of(large, by="teacher_entropy", top=0.3)
    monkeypatch.setattr(kdcache.losses.from_cache, "SAMPLE_POSITIONS", 600)
    monkeypatch.setattr(kdcache.losses.from_cache, "_READ_POSITIONS", 100)
    cache = open_cache(str(large))
    read = []
    whole_read = type(cache).read

    def watched(self: Any, indices: Any, **more: Any) -> Any:
        read.extend(indices)
        return whole_read(self, indices, **more)

    monkeypatch.setattr(type(cache), "read", watched)
    sampled = [share_of(large, by="teacher_entropy", top=0.3) for _ in range(2)]
    assert sampled[0] == sampled[1] != exact
    values = counted(large, range(300))["teacher_entropy"]
    assert (values >= sampled[0].min).mean() == pytest.approx(0.3, abs=0.05)
    read = read[: (len(read) - 300) // 2]  # the second sample and the reading of everything follow
    assert 500 <= cache.lengths_N[read].sum() <= 700
    assert len({cache.shard_of(index) for index in read}) == 16


def test_a_filter_is_applied_before_the_share_is_measured(tmp_path, cache):
    found = {}
    for name, where in (("all", None), ("short", "num_positions < 6")):
        objective = {"cross_entropy": {"weight": 1.0, "select": {"by": "teacher_entropy", "top": 0.5}}}
        values = settings(cache, tmp_path / name, max_steps=1, where=where, objective=objective)
        module = told(values)
        found[name] = module.objective.config.cross_entropy.select.min
    short = np.flatnonzero(open_cache(str(cache)).lengths_N < 6)
    assert found["short"] == share_of(cache, short, by="teacher_entropy", top=0.5).min != found["all"]


def test_numbers_need_no_look_into_the_cache(cache, monkeypatch):
    opened = open_cache(str(cache))
    monkeypatch.setattr(type(opened), "read", lambda *_args, **_more: pytest.fail("the cache was read"))
    for objective in (SCHEDULED, {"cross_entropy": {"weight": 1.0, "select": {"by": "confidence", "min": 0.5}}}):
        config = build(ObjectiveConfig, objective)
        assert resolve_selection(config, opened) is config
