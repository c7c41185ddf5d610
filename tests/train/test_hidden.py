"""Training with hidden-state terms, from the dump of a real (tiny) teacher to the exported student."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import ConfigError, StudentError
from kdcache.evaluate import evaluate_students
from kdcache.losses import Objective, ObjectiveConfig
from kdcache.losses.from_cache import context_of
from kdcache.step import StepInputs
from kdcache.students import StudentConfig, load_student
from kdcache.torch_data import to_torch
from kdcache.train.checkpoints import TERMS_FILE
from kdcache.train.module import Distiller, fit_terms
from tests.train_runs import Recorder, relative_difference, settings, train, train_distributed

#: The student nano has 4 layers of width 64, the teacher 2 of width 16.
OBJECTIVE: dict[str, Any] = {
    "forward_kl": {"weight": 0.5},
    "cross_entropy": {"weight": 0.5},
    "hidden_mse": {"weight": 0.4},
    "hidden_cosine": {"weight": 0.3, "layers": {0: 1, "last": 2}},
}
MAPS = {f"terms.{name}.weight" for name in ("hidden_mse.maps.2", "hidden_mse.maps.4", "hidden_cosine.maps.0")}
MAPS |= {"terms.hidden_cosine.maps.4.weight"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory, teacher_dir, corpus_file):
    """Windows of several documents, of the kind hidden, with all layers."""
    path = tmp_path_factory.mktemp("packed") / "cache"
    values = {
        "output": str(path),
        "teacher": {"model": str(teacher_dir), "device": "cpu"},
        "corpus": {"paths": [str(corpus_file)]},
        "sequences": {"max_length": 16, "packing": "window"},
        "targets": {"kind": "hidden"},
        "hidden_states": {"layers": [0, 1], "codec": "exact"},
        "shard_positions": 60,
    }
    dump_teacher(build(DumpConfig, values), progress=False)
    return path


@dataclass
class Run:
    gradients: list[dict[str, Tensor]]
    weights: list[dict[str, Tensor]]
    history: list[dict[str, float]]


def run(cache: Path, output: Path, **changes: Any) -> Run:
    recorder = Recorder()
    # Small steps: runs are compared beyond the first update too, and must not drift by rounding.
    values = settings(cache, output, **{"objective": OBJECTIVE, "learning_rate": 1e-6, **changes})
    train(values, callbacks=[recorder])
    return Run(recorder.gradients, recorder.weights, record_of(output)["history"])


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "kdcache_run.json").read_text())


def assert_same_gradients(found: Run, expected: Run) -> None:
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        assert set(a) == set(b) >= MAPS
        assert relative_difference(a, b) < 2e-6
        maps = [{name: gradients[name] for name in MAPS} for gradients in (a, b)]
        assert relative_difference(*maps) < 2e-6


def test_a_loop_of_your_own_may_have_terms(packed):
    """What the Trainer's module computes, from the parts that such a loop uses."""
    cache = open_cache(str(packed))
    student = load_student(StudentConfig(size="nano", seed=1), cache.manifest, cache.tokenizer_dir())
    objective = Objective(build(ObjectiveConfig, OBJECTIVE), context=context_of(cache))
    fit_terms(objective, student, seed=0)
    batch = next(iter(to_torch(cache, 4, pad_id=student.pad_id, fields=objective.needs.teacher_fields)))
    num_valid = batch["loss_mask"].sum()
    mine = StepInputs.of(student, batch, objective.needs).loss(objective, student, num_valid)
    loss, sums, count = Distiller(student, objective)(batch, num_valid)
    assert torch.equal(mine.loss, loss)
    assert mine.sums.keys() == sums.keys() == OBJECTIVE.keys()
    assert mine.num_valid == count
    with pytest.raises(ConfigError, match="read these fields of the cache too"):
        StepInputs.of(student, next(iter(to_torch(cache, 4, pad_id=student.pad_id))), objective.needs)


# ------------------------------------------------------------------------------------------ what is trained on


@pytest.mark.parametrize("kind", ["dumped", "packed"])
def test_a_student_that_is_the_teacher_agrees_in_every_stored_layer(tmp_path, request, teacher_dir, kind):
    cache = request.getfixturevalue(kind)
    stored = open_cache(str(cache)).manifest.layer_widths
    assert list(stored) == ([1, 2] if kind == "dumped" else [0, 1, 2])
    layers = {layer: layer for layer in stored}
    objective = {name: {"weight": 1.0, "layers": layers} for name in ("hidden_mse", "hidden_cosine")}
    student = {"model": str(teacher_dir)}
    found = run(cache, tmp_path / "out", student=student, objective=objective, max_steps=1)
    assert found.history[0]["hidden_mse"] == pytest.approx(0, abs=1e-6)
    assert found.history[0]["hidden_cosine"] == pytest.approx(0, abs=1e-6)


def test_another_layer_is_not_the_same(tmp_path, dumped, teacher_dir):
    objective = {"hidden_mse": {"weight": 1.0, "layers": {0: 1, 1: 2}}}
    found = run(dumped, tmp_path / "out", student={"model": str(teacher_dir)}, objective=objective, max_steps=1)
    assert found.history[0]["hidden_mse"] > 0.1


def test_loss_and_gradient_are_those_of_a_live_teacher(tmp_path, dumped, teacher_dir):
    """One sequence at a time, with the models' own ``output_hidden_states``: nothing of kdcache's losses is used."""
    objective = {"hidden_mse": {"weight": 0.4}, "hidden_cosine": {"weight": 0.3, "layers": {0: 1, 4: 2}}}
    cache = open_cache(str(dumped))
    found = run(dumped, tmp_path / "out", objective=objective, batch_sequences=len(cache), max_steps=2)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    student.load_state_dict(found.weights[1], strict=False)
    maps = {name: found.weights[1][name].requires_grad_() for name in MAPS}
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    total, count = torch.zeros(()), 0
    for index in range(len(cache)):
        batch = cache.read([index])
        ids = torch.from_numpy(batch.tokens_T.astype(np.int64))[None, :-1]
        valid_L = torch.from_numpy(batch.loss_mask_P.astype(bool))
        s = [state[0, valid_L] for state in student(input_ids=ids, output_hidden_states=True).hidden_states]
        with torch.no_grad():
            t = [state[0, valid_L] for state in teacher(input_ids=ids, output_hidden_states=True).hidden_states]
        for student_layer, teacher_layer in ((2, 1), (4, 2)):
            mapped = s[student_layer] @ maps[f"terms.hidden_mse.maps.{student_layer}.weight"].T
            size = t[teacher_layer].square().mean(-1) + 1e-6
            total = total + 0.4 / 2 * ((mapped - t[teacher_layer]).square().mean(-1) / size).sum()
        for student_layer, teacher_layer in ((0, 1), (4, 2)):
            mapped = s[student_layer] @ maps[f"terms.hidden_cosine.maps.{student_layer}.weight"].T
            total = total + 0.3 / 2 * (1 - nn.functional.cosine_similarity(mapped, t[teacher_layer], dim=-1)).sum()
        count += int(valid_L.sum())
    (total / count).backward()
    assert found.history[1]["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    expected = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    expected |= {name: weight.grad for name, weight in maps.items()}
    assert relative_difference({name: found.gradients[1][name] for name in expected}, expected) < 1e-5


@pytest.mark.parametrize("kind", ["dumped", "packed"])
def test_accumulation_padding_and_checkpointing_do_not_change_the_gradient(tmp_path, request, kind):
    cache = request.getfixturevalue(kind)
    whole = run(cache, tmp_path / "whole")
    for name, changes in {
        "split": {"batch_sequences": 2, "gradient_accumulation": 4},
        # More micro-batches than the last step has sequences: some are all masked.
        "single": {"batch_sequences": 1, "gradient_accumulation": 8},
        "checkpointing": {"gradient_checkpointing": True},
    }.items():
        assert_same_gradients(run(cache, tmp_path / name, **changes), whole)


def test_bfloat16_autocast_stays_close(tmp_path, dumped):
    whole, found = (run(dumped, tmp_path / p, precision=p, max_steps=1) for p in ("fp32", "bf16"))
    maps = [{name: item.gradients[0][name] for name in MAPS} for item in (found, whole)]
    assert 0 < relative_difference(*maps) < 0.03
    assert found.history[0]["hidden_mse"] == pytest.approx(whole.history[0]["hidden_mse"], rel=0.01)


def gpt2_file(folder: Path) -> str:
    """A student whose LM head is untied, so that no term gives it a gradient."""
    file = folder / "student.json"
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    file.write_text(json.dumps({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2} | dropouts))
    return str(file)


@pytest.mark.slow
def test_two_processes_do_not_change_the_gradient(tmp_path, dumped, preloaded):
    alone = {"hidden_mse": {"weight": 1.0, "layers": {1: 1}, "projection": "linear"}, "hidden_cosine": {"weight": 0.0}}
    rising = {"schedule": "linear", "start": 0.0, "end": 1.0}
    selected = {
        "forward_kl": {"weight": rising, "select": {"by": "teacher_loss", "top": 0.03}},
        "hidden_mse": {"weight": 0.5, "select": {"by": "teacher_entropy", "bottom": 0.03}},
        "hidden_cosine": {"weight": rising, "layers": {0: 1, "last": 2}, "select": {"by": "confidence", "top": 0.03}},
    }
    changes = {
        "all": {"objective": OBJECTIVE},
        # Neither the second block nor the head has anything to learn.
        "alone": {"objective": alone, "student": {"config_file": gpt2_file(tmp_path)}},
        # A few positions each, at other weights in every step: many micro-batches have none for some part.
        "selected": {"objective": selected},
    }
    halves = {"learning_rate": 1e-6, "batch_sequences": 2, "gradient_accumulation": 2, "save_steps": 2}
    runs = {name: settings(dumped, tmp_path / name, **halves, **given) for name, given in changes.items()}
    recorded = train_distributed(runs, tmp_path, preloaded)
    for name, given in changes.items():
        whole = run(dumped, tmp_path / f"{name}-whole", **given)
        for a, b in zip(recorded[name]["gradients"], whole.gradients, strict=True):
            assert relative_difference(a, b) < 2e-6
        assert any(key.startswith("terms.") for key in recorded[name]["gradients"][0])
    assert (tmp_path / "all" / TERMS_FILE).exists()


def test_training_brings_the_states_together(tmp_path, dumped):
    values = settings(dumped, tmp_path / "out", objective=OBJECTIVE, max_steps=80, learning_rate=3e-3)
    result = train(values)
    first, last = record_of(tmp_path / "out")["history"][0], record_of(tmp_path / "out")["history"][-1]
    for name in ("hidden_mse", "hidden_cosine"):
        assert last[name] < 0.5 * first[name]
        assert result.losses[name] == last[name]
    weighted = sum(OBJECTIVE[name]["weight"] * last[name] for name in OBJECTIVE)
    assert last["loss"] == pytest.approx(weighted, rel=1e-5)


def test_hidden_states_alone_leave_the_head_untrained_and_a_warning(tmp_path, dumped, caplog):
    student = {"config_file": gpt2_file(tmp_path)}
    found = run(dumped, tmp_path / "out", objective={"hidden_mse": {"weight": 1.0}}, student=student, max_steps=2)
    assert found.gradients[0]["lm_head.weight"].abs().sum() == 0
    assert found.history[0]["loss"] == pytest.approx(found.history[0]["hidden_mse"])
    assert "no loss besides hidden_mse, so the student's LM head learns nothing" in caplog.text
    caplog.clear()
    run(dumped, tmp_path / "both", objective=OBJECTIVE, max_steps=1)
    assert "learns nothing" not in caplog.text


# ---------------------------------------------------------------------------------------- what a run leaves behind


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def files(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors") | load_file(output / TERMS_FILE)


RESUMABLE = {
    "objective": OBJECTIVE,
    "max_steps": 7,
    "save_steps": 2,
    "save_total_limit": 1,
    "learning_rate": 1e-2,
    "batch_sequences": 3,
    "max_grad_norm": 1.0,
}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, dumped):
    train(settings(dumped, tmp_path / "whole", **RESUMABLE))
    part = settings(dumped, tmp_path / "part", **RESUMABLE)
    with pytest.raises(KeyboardInterrupt):
        train(part, callbacks=[Interrupt(5)])
    assert [path.name for path in (tmp_path / "part").glob("checkpoint-*")] == ["checkpoint-4"]
    begun = files(tmp_path / "part" / "checkpoint-4")
    train(part, resume=True)
    expected, found = files(tmp_path / "whole"), files(tmp_path / "part")
    assert set(found) == set(expected) >= MAPS
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(not torch.equal(found[name], begun[name]) for name in MAPS)


def test_resume_after_the_last_step_saves_the_maps(tmp_path, dumped):
    values = settings(dumped, tmp_path / "out", **RESUMABLE)
    train(values)
    expected = files(tmp_path / "out")
    record = tmp_path / "out" / "kdcache_run.json"
    record.write_text(json.dumps(record_of(tmp_path / "out") | {"status": "running"}))
    (tmp_path / "out" / TERMS_FILE).unlink()
    train(values, resume=True)
    found = files(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "has 40 of .* bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"), "is damaged"),
    ],
)
def test_resume_without_the_maps_is_refused(tmp_path, dumped, damage, words):
    values = settings(dumped, tmp_path / "out", **RESUMABLE)
    with pytest.raises(KeyboardInterrupt):
        train(values, callbacks=[Interrupt(3)])
    damage(tmp_path / "out" / "checkpoint-2" / TERMS_FILE)
    with pytest.raises(StudentError, match=rf"checkpoint-2 .*its file {TERMS_FILE} {words}.*bring the file back"):
        train(values, resume=True)


def test_resume_with_other_layers_is_refused(tmp_path, dumped):
    values = settings(dumped, tmp_path / "out", objective=OBJECTIVE, max_steps=1)
    train(values)
    other = OBJECTIVE | {"hidden_mse": {"weight": 0.4, "layers": {1: 1}}}
    with pytest.raises(ConfigError, match=r"cannot resume .* objective was .*hidden_mse"):
        train(values | {"objective": other}, resume=True)


def test_the_exported_student_knows_nothing_of_the_maps(tmp_path, dumped):
    train(settings(dumped, tmp_path / "out", objective=OBJECTIVE, max_steps=3, save_steps=2))
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        _, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert set(said) >= {"missing_keys", "unexpected_keys"}
        assert not any(said.values()), said
        assert set(load_file(folder / TERMS_FILE)) == MAPS


def test_the_record_and_the_evaluation_of_a_run(tmp_path, dumped):
    train(settings(dumped, tmp_path / "out", objective=OBJECTIVE, max_steps=2))
    train(settings(dumped, tmp_path / "plain", max_steps=2))
    assert record_of(tmp_path / "out")["terms"] == {
        "hidden_mse": {"layers": {"2": 1, "4": 2}, "projections": [2, 4]},
        "hidden_cosine": {"layers": {"0": 1, "4": 2}, "projections": [0, 4]},
        "file": "terms.safetensors",
        "num_parameters": 4 * 64 * 16,
    }
    assert "terms" not in record_of(tmp_path / "plain")
    rows = evaluate_students(str(dumped), [str(tmp_path / "out"), str(tmp_path / "plain")], progress=False).students
    assert rows[0].num_parameters == rows[1].num_parameters
    assert rows[0].num_bytes == rows[1].num_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_terms_without_parameters_leave_no_file(tmp_path, dumped, teacher_dir):
    objective = OBJECTIVE | {"hidden_cosine": None}
    run(dumped, tmp_path / "out", objective=objective, student={"model": str(teacher_dir)}, max_steps=2, save_steps=1)
    assert not list((tmp_path / "out").rglob(TERMS_FILE))
    assert record_of(tmp_path / "out")["terms"]["file"] is None


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["hidden_mse.weight=1", "hidden_mse.layers.2=3"], "layer 3, and the cache stores those of layer 1, 2 of 0"),
        (["hidden_mse.weight=1", "hidden_mse.layers={9: 2}"], "hidden_mse: the student has no layer 9; it has 0"),
        (["hidden_cosine.weight=1", "hidden_cosine.projection=none"], "layer 2 of the student is 64 wide and layer 1"),
        (["hidden_mse.layers.2=2"], "'objective.hidden_mse.weight' is required"),
        (["hidden_mse.weight=1", "hidden_mse.layer.2=2"], "did you mean 'layers'"),
        (["hidden_mes.weight=1"], "unknown setting 'objective.hidden_mes'; did you mean 'hidden_mse'"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, dumped, monkeypatch, capsys, assignments, words, dry):
    from kdcache.cli import main

    given = [part for item in assignments for part in ("--set", f"objective.{item}")]
    where = ["--cache", str(dumped), "--student-size", "nano", "--output", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["kdcache", "train-student", *where, *given, *dry])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_a_cache_without_hidden_states_and_a_student_without_them(tmp_path, dumped, monkeypatch):
    objective = {"hidden_mse": {"weight": 1.0}}
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.schema.Plan.layer_widths", {})
        with pytest.raises(ConfigError, match=r"hidden_mse: .* the cache stores none; dump with --hidden-states"):
            train(settings(dumped, tmp_path / "out", objective=objective))
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def silent(self: Any, *args: Any, output_hidden_states: bool = False, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", silent)
    with pytest.raises(StudentError, match=r"LlamaForCausalLM.* does not return the states of its layers"):
        train(settings(dumped, tmp_path / "out", objective=objective))
