from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from kdcache.cache import epoch_order, open_cache
from kdcache.config import build
from kdcache.errors import CacheError, ConfigError, IncompleteCacheError, StudentError
from kdcache.students.sizes import SIZES, llama_config
from kdcache.train import TrainConfig, preview_training
from kdcache.train.prepare import num_steps
from kdcache.train.run_record import RunRecord
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import Recorder, live_loss, relative_difference, settings, train

TOKENIZER = bpe_tokenizer()
VOCAB_SIZE = len(TOKENIZER)


@pytest.fixture(scope="module")
def teacher():
    return llama(VOCAB_SIZE, seed=5)


@pytest.fixture(scope="module")
def sequences():
    # 19 = 2 steps of 8 and one of 3: fewer sequences than four micro-batches.
    return random_sequences(19, VOCAB_SIZE, seed=1)


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher, sequences):
    folder = tmp_path_factory.mktemp("caches")
    return {k: make_cache(folder / str(k), teacher, TOKENIZER, sequences, top_k=k) for k in (8, VOCAB_SIZE)}


# ----------------------------------------------------------------------- the cache replaces the teacher


@pytest.mark.parametrize("top_k", [VOCAB_SIZE, 8])
def test_training_from_the_cache_is_training_with_the_teacher(tmp_path, teacher, sequences, caches, top_k):
    """Twenty AdamW steps: at the weights of every step, loss and gradient equal those of a live teacher, and a training
    loop of its own with the live teacher runs along the same losses."""
    cache = open_cache(str(caches[top_k]))
    weight, steps, batch = 0.7, 20, 4
    objective = {"forward_kl": {"weight": weight}, "cross_entropy": {"weight": 1 - weight}}
    recorder, history = Recorder(), LossHistory()
    values = settings(
        caches[top_k],
        tmp_path / "out",
        max_steps=steps,
        batch_sequences=batch,
        objective=objective,
        schedule="constant_with_warmup",
        learning_rate=1e-3,
        weight_decay=0.0,
    )
    train(values, callbacks=[recorder, history])

    order = [step for epoch in range(4) for step in steps_of(cache, epoch, batch)]
    masks = {index: cache.read([index]).loss_mask_P for index in range(len(sequences))}

    alone = initial_student(recorder)
    optimiser = torch.optim.AdamW(alone.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    probe = copy.deepcopy(alone)
    for step in range(steps):
        chosen = order[step]
        given = ([sequences[i] for i in chosen], [masks[i] for i in chosen], top_k, weight)
        probe.load_state_dict(recorder.weights[step], strict=False)
        probe.zero_grad()
        loss = live_loss(probe, teacher, *given)
        loss.backward()
        gradients = {name: p.grad for name, p in probe.named_parameters()}
        assert history.losses[step] == pytest.approx(loss.item(), rel=1e-6)
        assert relative_difference(recorder.gradients[step], gradients) <= 1e-6

        optimiser.zero_grad()
        loss = live_loss(alone, teacher, *given)
        loss.backward()
        optimiser.step()
        assert history.losses[step] == pytest.approx(loss.item(), rel=1e-5), "two free runs stay together"


def steps_of(cache, epoch, size):
    order = epoch_order(cache.shard_starts, 0, epoch, key=cache.order_key)
    return np.array_split(order, range(size, len(order), size))


class LossHistory(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses.append(logs["loss"])


def initial_student(recorder):
    model = AutoModelForCausalLM.from_config(llama_config(SIZES["nano"], VOCAB_SIZE, max_position_embeddings=2048))
    model.load_state_dict(recorder.weights[0], strict=False)
    model.tie_weights()
    return model.train()


# ------------------------------------------------------------------------------------------------ precision


def gradients(cache, output, **changes):
    recorder = Recorder()
    train(settings(cache, output, learning_rate=1e-6, **changes), callbacks=[recorder])
    return recorder.gradients


def test_bfloat16_autocast_stays_close(tmp_path, caches):
    whole = gradients(caches[8], tmp_path / "fp32")
    found = gradients(caches[8], tmp_path / "bf16", precision="bf16")
    assert 0 < relative_difference(found[0], whole[0]) < 0.02
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert saved.dtype == torch.float32, "autocast leaves the weights alone"


# --------------------------------------------------------------------------------- what a run leaves behind


LOAD_WITHOUT_KDCACHE = """
import sys
sys.modules["kdcache"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("the cat sat", return_tensors="pt")
torch.save((inputs["input_ids"], model(**inputs).logits), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_output_and_checkpoints_load_without_kdcache(tmp_path, caches, place):
    recorder = Recorder()
    train(settings(caches[8], tmp_path / "out", max_steps=3, save_steps=2, learning_rate=0.1), callbacks=[recorder])
    subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_KDCACHE, str(tmp_path / "out" / place), str(tmp_path / "logits.pt")],
        check=True,
    )
    ids, logits = torch.load(tmp_path / "logits.pt")
    assert ids[0].tolist() == TOKENIZER("the cat sat")["input_ids"]
    expected = initial_student(recorder).eval()
    if place:
        # The weights before the third step are those after the second.
        expected.load_state_dict(recorder.weights[2], strict=False)
        assert torch.allclose(logits, expected(input_ids=ids).logits, atol=1e-5)
    else:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.allclose(logits, saved(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(logits, expected(input_ids=ids).logits, atol=1e-2), "it has learnt something"


def test_run_record_says_what_made_the_student(tmp_path, caches):
    cache = open_cache(str(caches[8]))
    result = train(settings(caches[8], tmp_path / "out", logging_steps=3))
    record = json.loads((tmp_path / "out" / "kdcache_run.json").read_text())
    assert record["status"] == "finished"
    assert record["cache"]["fingerprint"] == cache.fingerprint
    assert record["teacher"]["name"] == "tiny-teacher"
    assert [entry["step"] for entry in record["history"]] == [3, 4], "the last step is always logged"
    last = record["history"][-1]
    assert last["loss"] == pytest.approx(0.9 * last["forward_kl"] + 0.1 * last["cross_entropy"], rel=1e-5)
    assert result.losses == {name: last[name] for name in ("loss", "forward_kl", "cross_entropy")}
    assert result.steps == 4
    assert result.tokens_per_s > 0
    assert not list((tmp_path / "out").glob("*.bin")), "nothing pickled beside the model"


def test_progress_shows_every_term(tmp_path, caches, capsys):
    from kdcache.train import train_student

    train_student(build(TrainConfig, settings(caches[8], tmp_path / "out")), progress=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert all(word in shown for word in ("forward_kl=", "cross_entropy=", "tokens/s="))


# ------------------------------------------------------------------------------------------------ resuming


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(output):
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def dropout_student(tmp_path):
    file = tmp_path / "student.json"
    file.write_text(json.dumps({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.2}))
    return {"config_file": str(file)}


@pytest.mark.parametrize("interrupted", [1, 3, 5, 8])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, caches, interrupted):
    # 5 steps an epoch, checkpoints after 2, 4, 6 and 8: resumes from the start, inside an epoch and in the second one.
    values = {
        "max_steps": 9,
        "save_steps": 2,
        "batch_sequences": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "warmup_ratio": 0.2,
        "max_grad_norm": 1.0,
        "student": dropout_student(tmp_path),
    }
    train(settings(caches[8], tmp_path / "whole", **values))
    part = settings(caches[8], tmp_path / "part", **values)
    with pytest.raises(KeyboardInterrupt):
        train(part, callbacks=[Interrupt(interrupted)])
    result = train(part, resume=True)
    assert result.steps == 9
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kl_history(tmp_path / "part") == kl_history(tmp_path / "whole")


def kl_history(output):
    return [entry["forward_kl"] for entry in json.loads((output / "kdcache_run.json").read_text())["history"]]


def test_resume_skips_a_half_written_checkpoint(tmp_path, caches):
    values = settings(caches[8], tmp_path / "out", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(values, callbacks=[Interrupt(3)])
    # The newest lacks its end, as when the machine went down while it was written.
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    recorder = Recorder()
    train(values, resume=True, callbacks=[recorder])
    assert len(recorder.gradients) == 3


def test_resume_with_a_checkpoint_of_the_last_step_only_saves(tmp_path, caches):
    values = settings(caches[8], tmp_path / "out")
    first = train(values)
    expected = weights(tmp_path / "out")
    record = tmp_path / "out" / "kdcache_run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "running"}))
    (tmp_path / "out" / "model.safetensors").unlink()
    result = train(values, resume=True)
    assert (result.steps, result.losses) == (first.steps, first.losses)
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_resume_of_a_finished_run_gives_its_result_again(tmp_path, caches):
    values = settings(caches[8], tmp_path / "out")
    assert train(values, resume=True) == train(values, resume=True)


def without_none(data):
    return {k: without_none(v) for k, v in data.items() if v is not None} if isinstance(data, dict) else data


def test_a_run_of_a_version_that_knew_fewer_settings_can_be_resumed(tmp_path, caches):
    values = settings(caches[8], tmp_path / "out")
    first = train(values)
    path = tmp_path / "out" / "kdcache_run.json"
    record = json.loads(path.read_text())
    older = {**record, "settings": without_none(record["settings"])}
    assert older != record
    path.write_text(json.dumps(older))
    assert train(values, resume=True) == first
    with pytest.raises(ConfigError, match="where was None and is 'num_positions > 1'"):
        train({**values, "where": "num_positions > 1"}, resume=True)


def test_a_student_can_be_trained_further(tmp_path, caches):
    train(settings(caches[8], tmp_path / "first"))
    before = weights(tmp_path / "first")
    recorder = Recorder()
    train(settings(caches[8], tmp_path / "second", student={"model": str(tmp_path / "first")}), callbacks=[recorder])
    assert all(torch.equal(value, before[name]) for name, value in recorder.weights[0].items())


# ------------------------------------------------------------------------------------------------- mistakes


def test_output_of_a_run_is_not_overwritten(tmp_path, caches):
    values = settings(caches[8], tmp_path / "out", max_steps=1)
    train(values)
    with pytest.raises(ConfigError, match="already holds a run; resume it"):
        train(values)


@pytest.mark.parametrize("changes", [{"learning_rate": 0.5}, {"seed": 7}, {"max_steps": 3}, {"batch_sequences": 3}])
def test_resume_with_other_settings_is_refused(tmp_path, caches, changes):
    train(settings(caches[8], tmp_path / "out", max_steps=1))
    name = {"max_steps": "steps", "batch_sequences": "sequences_per_step"}.get(next(iter(changes)), next(iter(changes)))
    with pytest.raises(ConfigError, match=f"cannot resume .* {name} was .* and is"):
        train(settings(caches[8], tmp_path / "out", **{"max_steps": 1, **changes}), resume=True)


def test_resume_on_another_cache_is_refused(tmp_path, caches):
    train(settings(caches[8], tmp_path / "out", max_steps=1))
    with pytest.raises(ConfigError, match="cache_fingerprint was"):
        train(settings(caches[VOCAB_SIZE], tmp_path / "out", max_steps=1), resume=True)


def test_output_that_is_a_cache_a_model_or_a_file(tmp_path, caches):
    with pytest.raises(ConfigError, match="holds a model or a cache"):
        train(settings(caches[8], caches[8]))
    llama(VOCAB_SIZE).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="holds a model or a cache"):
        train(settings(caches[8], tmp_path / "model"), resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        train(settings(caches[8], tmp_path / "file"))


def test_cache_that_cannot_be_used(tmp_path, teacher):
    with pytest.raises(CacheError):
        train(settings(tmp_path / "nothing", tmp_path / "out"))
    half = make_cache(tmp_path / "half", teacher, TOKENIZER, random_sequences(3, VOCAB_SIZE), finish=False)
    with pytest.raises(IncompleteCacheError):
        train(settings(half, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_student_that_does_not_fit_leaves_no_output(tmp_path, caches):
    llama(VOCAB_SIZE - 1).save_pretrained(tmp_path / "student")
    with pytest.raises(StudentError, match="token ids"):
        train(settings(caches[8], tmp_path / "out", student={"model": str(tmp_path / "student")}))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_device_that_is_not_there(tmp_path, caches):
    with pytest.raises(ConfigError, match="no usable CUDA device"):
        train(settings(caches[8], tmp_path / "out", device="cuda"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epochs": 1.0}, "epochs or max_steps, not both"),
        ({"learning_rat": 1.0}, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"objective": {"forward_lk": {"weight": 1}}}, "did you mean 'forward_kl'"),
        ({"max_steps": None, "epochs": math.inf}, "'epochs'.*finite"),
        ({"learning_rate": math.inf}, "'learning_rate'.*finite"),
        ({"max_grad_norm": math.inf}, "'max_grad_norm'.*finite"),
        ({"batch_sequences": 0}, "batch_sequences"),
        ({"objective": {"forward_kl": {"weight": 1, "temperature": 1e9}}}, "temperature'.*less than or equal to 1000"),
        ({"seed": -5}, "'seed'.*greater than or equal to 0"),
        ({"seed": 2**40}, "'seed'.*less than 4294967296"),
        ({"student": {"size": "nano", "seed": -5}}, "'student.seed'.*greater than or equal to 0"),
        ({"student": {"size": "nano", "model": "x"}}, "exactly one of"),
        ({"student": {"model": ""}}, "'student.model'.*at least 1 character"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, match):
    with pytest.raises(ConfigError, match=match):
        build(TrainConfig, settings(tmp_path, tmp_path, **changes))


def test_plan_tells_steps_and_sizes_without_training(tmp_path, caches, sequences):
    values = settings(caches[8], tmp_path / "out", max_steps=None, epochs=2.0, gradient_accumulation=1)
    plan = preview_training(build(TrainConfig, values))
    assert (plan.steps, plan.steps_per_epoch, plan.epochs) == (6, 3, 2.0)
    assert plan.num_positions == sum(len(s) - 1 for s in sequences)
    assert plan.num_parameters == VOCAB_SIZE * 64 + SIZES["nano"].num_parameters - 49_152 * 64
    assert plan.learning_rate == 1e-3
    assert not (tmp_path / "out").exists()
    train(values)
    assert json.loads((tmp_path / "out" / "kdcache_run.json").read_text())["steps"] == 6


def test_a_diverged_run_fails_and_saves_nothing(tmp_path, caches):
    values = settings(caches[8], tmp_path / "out", learning_rate=1e30, max_steps=6)
    with pytest.raises(StudentError, match=r"diverged: the loss at step [2-6] is .*lower learning_rate"):
        train(values)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    record = json.loads((tmp_path / "out" / "kdcache_run.json").read_text())
    assert record["status"] == "running"


def test_the_run_record_has_null_where_a_number_is_not_finite(tmp_path):
    record = RunRecord(tmp_path / "kdcache_run.json", {})
    record.finish(history=[{"loss": 1.5, "grad_norm": float("nan")}], losses={"loss": float("inf")})
    content = json.loads(record.path.read_text(), parse_constant=pytest.fail)
    assert content["history"] == [{"loss": 1.5, "grad_norm": None}]
    assert content["losses"] == {"loss": None}


@pytest.mark.parametrize(("damage", "words"), [(Path.unlink, "is missing"), (lambda p: p.write_text("{"), "cannot be")])
def test_resume_without_a_run_record_is_refused(tmp_path, caches, damage, words):
    values = settings(caches[8], tmp_path / "out", save_steps=1, max_steps=2)
    train(values)
    damage(tmp_path / "out" / "kdcache_run.json")
    with pytest.raises(ConfigError, match=f"cannot resume .*kdcache_run.json {words}"):
        train(values | {"learning_rate": 0.5}, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_output_with_files_of_somebody_else(tmp_path, caches, resume):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    values = settings(caches[8], tmp_path / "out", max_steps=1)
    with pytest.raises(ConfigError, match=r"out is not empty \(found thesis.tex\); choose another directory"):
        train(values, resume=resume)
    (tmp_path / "out" / "thesis.tex").unlink()
    assert train(values, resume=resume).steps == 1, "an empty directory is fine"


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("tensorbord", None, "did you mean 'tensorboard'"),
        ("wandb", RuntimeError("wandb:\n not here"), "wandb: not here"),
    ],
)
def test_a_logger_that_cannot_be_used(tmp_path, caches, monkeypatch, name, error, words):
    def absent():
        raise error

    if error is not None:
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, absent)
    values = settings(caches[8], tmp_path / "out", report_to=name)
    with pytest.raises(ConfigError, match=f"report_to.*{words}"):
        train(values)
    with pytest.raises(ConfigError, match=words):
        preview_training(build(TrainConfig, values))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 110), (0.55, 55), (0.551, 56), (2, 200), (1e-9, 1)])
def test_steps_of_a_part_of_an_epoch(epochs, steps):
    values = {"cache": "cache", "output": "out", "student": {"size": "nano"}, "epochs": epochs}
    assert num_steps(build(TrainConfig, values), 100) == steps
