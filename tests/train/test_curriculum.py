"""Training runs that filter and order their sequences by the per-sequence table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from kdcache.cache import open_cache
from kdcache.config import build, load
from kdcache.errors import ConfigError
from kdcache.train import TrainConfig, prepare, preview_training
from tests.cli.conftest import run  # noqa: F401  (a fixture)
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import settings, train


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory):
    tokenizer = bpe_tokenizer()
    sequences = random_sequences(19, len(tokenizer), seed=1)
    return make_cache(tmp_path_factory.mktemp("caches") / "c", llama(len(tokenizer), seed=5), tokenizer, sequences)


class Seen(TrainerCallback):
    """Stop before ``stop`` more steps are done, as a crash would."""

    def __init__(self, stop):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def steps_of(config):
    """The sequences of every step of the first epoch."""
    cache = prepare.open_training_cache(config)
    return [sorted(batch) for batch in prepare.micro_batches(config, cache)]


def config_of(cache_path, **changes):
    return build(TrainConfig, settings(cache_path, "out", **{"max_steps": None, **changes}))


def losses_of(cache_path, steps):
    losses = np.asarray(open_cache(str(cache_path)).sequence_table()["teacher_loss"])
    return [losses[step].mean() for step in steps]


def test_easy_sequences_come_first(cache_path):
    for settings_, sign in (({}, 1), ({"order": "hard-to-easy"}, -1)):
        steps = steps_of(config_of(cache_path, batch_sequences=4, curriculum={"pacing": "sorted", **settings_}))
        means = [sign * mean for mean in losses_of(cache_path, steps)]
        assert means == sorted(means)
        assert sorted(n for step in steps for n in step) == list(range(19))
    shortest = steps_of(config_of(cache_path, batch_sequences=4, curriculum={"by": "num_positions", "start": 0.01}))
    lengths = open_cache(str(cache_path)).lengths_N
    assert sorted(lengths[shortest[0]]) == sorted(lengths)[:4]


def test_a_filter_leaves_sequences_out_of_steps_plan_and_order(cache_path):
    lengths = open_cache(str(cache_path)).lengths_N
    chosen = np.flatnonzero(lengths > 6).tolist()
    assert 4 < len(chosen) < 19
    for curriculum in (None, {"pacing": "root"}):
        config = config_of(cache_path, batch_sequences=2, epochs=2, where="num_positions > 6", curriculum=curriculum)
        assert sorted(n for step in steps_of(config) for n in step) == chosen
        plan = preview_training(config)
        assert plan.steps_per_epoch == -(-len(chosen) // 2)
        assert plan.steps == 2 * plan.steps_per_epoch
        assert (plan.num_sequences, plan.num_positions) == (len(chosen), lengths[chosen].sum())


def test_other_seeds_are_other_curricula_and_other_caches_of_the_texts_are_not(cache_path, tmp_path):
    changes = {"batch_sequences": 4, "curriculum": {"by": "num_positions"}}
    assert steps_of(config_of(cache_path, **changes)) != steps_of(config_of(cache_path, **changes, seed=1))
    tokenizer = bpe_tokenizer()
    sequences = random_sequences(19, len(tokenizer), seed=1)
    other = make_cache(tmp_path / "c", llama(len(tokenizer), seed=6), tokenizer, sequences, top_k=4)
    assert steps_of(config_of(other, **changes)) == steps_of(config_of(cache_path, **changes))


@pytest.mark.parametrize("changes", [{"curriculum": {"start": 0.1}}, {"where": "num_positions > 2"}])
def test_a_run_resumed_inside_a_curriculum_ends_with_the_same_weights(cache_path, tmp_path, changes):
    values = {"max_steps": 7, "epochs": None, "save_steps": 2, "batch_sequences": 2, "gradient_accumulation": 2}
    values |= {"learning_rate": 1e-2, **changes}
    train(settings(cache_path, tmp_path / "whole", **values))
    with pytest.raises(KeyboardInterrupt):
        train(settings(cache_path, tmp_path / "part", **values), callbacks=[Seen(5)])
    train(settings(cache_path, tmp_path / "part", **values), resume=True)
    whole, part = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(part[name], whole[name]) for name in whole)
    shuffled = {name: value for name, value in values.items() if name not in changes}
    train(settings(cache_path, tmp_path / "plain", **shuffled))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert not all(torch.equal(plain[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"curriculum": {"start": 0.3}}, "curriculum"),
        ({"curriculum": None}, "curriculum"),
        ({"where": "num_positions > 2"}, "where"),
    ],
)
def test_resume_with_another_curriculum_or_filter_is_refused(cache_path, tmp_path, changes, name):
    values = {"max_steps": 1, "curriculum": {"start": 0.2}}
    train(settings(cache_path, tmp_path / "out", **values))
    with pytest.raises(ConfigError, match=f"cannot resume .* {name} was .* and is"):
        train(settings(cache_path, tmp_path / "out", **values | changes), resume=True)


def test_the_run_record_says_what_was_trained_on(cache_path, tmp_path):
    train(settings(cache_path, tmp_path / "out", max_steps=1, where="num_positions > 2", curriculum={}))
    decided = json.loads((tmp_path / "out" / "kdcache_run.json").read_text())["settings"]
    assert decided["where"] == "num_positions > 2"
    assert decided["curriculum"] == {
        "by": "teacher_loss",
        "order": "easy-to-hard",
        "pacing": "root",
        "start": 0.2,
        "full_at": 0.5,
    }


def test_the_recorded_settings_of_a_run_are_settings_again(cache_path, tmp_path):
    values = settings(cache_path, tmp_path / "out", max_steps=1, curriculum={"pacing": "sorted"})
    train(values)
    recorded = json.loads((tmp_path / "out" / "kdcache_run.json").read_text())["config"]
    # What was not given is recorded as what was trained on.
    assert build(TrainConfig, recorded) == build(TrainConfig, {**values, "objective": {}})


def test_what_the_recipe_says_to_change_can_be_changed():
    folder = Path(__file__).parents[2] / "pipelines" / "progressive"
    advice = re.findall(r"--set ([a-z_.]+=[a-z0-9.]+)", (folder / "README.md").read_text())
    assert len(advice) == 4
    for assignment in advice:
        options = {"cache": "c", "output": "o"}
        load(TrainConfig, file=folder / "progressive.yaml", options=options, assignments=[assignment])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": "num_positions > 99"}, "selects none of the 19 sequences .num_positions is 1 to 1[0-9]"),
        ({"where": "teacher_los < 5"}, "did you mean 'teacher_loss'"),
        ({"curriculum": {"by": "entropy"}}, "curriculum.by: unknown column 'entropy'; did you mean 'teacher_entr"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(cache_path, tmp_path, changes, message):
    values = settings(cache_path, tmp_path / "out", **changes)
    with pytest.raises(ConfigError, match=message):
        preview_training(build(TrainConfig, values))
    with pytest.raises(ConfigError, match=message):
        train(values)
    assert not (tmp_path / "out").exists()


def test_a_curriculum_keeps_all_shards_open_and_warns_when_they_are_too_many(cache_path, monkeypatch, caplog):
    plain = config_of(cache_path, shuffle_window=1, num_streams=1)
    assert prepare.open_training_cache(plain).max_open_shards == 2
    config = config_of(cache_path, shuffle_window=1, num_streams=1, curriculum={})
    assert prepare.open_training_cache(config).max_open_shards == 3
    assert not caplog.records
    cache = open_cache(str(cache_path))
    prepare.warn_of_rereading(config, cache, ())
    monkeypatch.setattr(prepare, "OPEN_BYTES", 1000)
    prepare.warn_of_rereading(config, cache, ())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a curriculum reads from all over the cache" in caplog.text
    assert "batches will read shards again and again. Train without one" in caplog.text


def test_a_window_that_cannot_stay_open_is_warned_of(cache_path, monkeypatch, caplog):
    cache = open_cache(str(cache_path))
    num_bytes = cache.encoded_bytes()
    monkeypatch.setattr(prepare, "OPEN_BYTES", num_bytes // 2)
    prepare.warn_of_rereading(config_of(cache_path, num_streams=1), cache, ())
    assert not caplog.records
    prepare.warn_of_rereading(config_of(cache_path, num_streams=2), cache, ())
    assert "the order of training mixes 2 shards" in caplog.text
    assert "Lower num_streams or shuffle_window" in caplog.text


def test_options_of_the_command(run, cache_path, tmp_path):  # noqa: F811
    command = ["train-student", "--cache", cache_path, "--student-size", "nano", "--output", tmp_path / "run"]
    command += ["--where", "num_positions > 6", "--curriculum", "num_positions", "--batch-sequences", "2", "--json"]
    plan = json.loads(run(*command, "--set", "curriculum.order=hard-to-easy", "--dry-run").out)
    assert plan["num_sequences"] < 19
    assert "did you mean 'num_positions'" in run(*command, "--curriculum", "num_position", "--dry-run").message()
    assert (
        "pacing sorted has no start"
        in run(*command, "--set", "curriculum={pacing: sorted, start: 0.5}", "--dry-run").message()
    )
    done = run(*command, "-q", "--max-steps", "2", "--device", "cpu")
    assert json.loads(done.out)["steps"] == 2
    record = json.loads((tmp_path / "run" / "kdcache_run.json").read_text())
    assert record["config"]["curriculum"]["by"] == "num_positions"
    assert record["config"]["where"] == "num_positions > 6"


def test_the_progressive_recipe_differs_from_the_plain_one_in_two_settings():
    recipes = Path(__file__).parents[2] / "pipelines"
    files = [recipes / "causal_lm" / "train.yaml", recipes / "progressive" / "progressive.yaml"]
    plain, progressive = (load(TrainConfig, file=file, options={"cache": "c", "output": "o"}) for file in files)
    assert progressive.curriculum is not None
    assert progressive.objective.forward_kl.at(0.0).temperature == 2
    assert progressive.objective.forward_kl.at(1.0) == plain.objective.forward_kl
    objective = progressive.objective.model_copy(update={"forward_kl": plain.objective.forward_kl})
    assert progressive.model_copy(update={"curriculum": None, "objective": objective}) == plain
