"""Every option of a student, in each of the ways that a run begins: with its report, as a dry run, planned by a sweep.

They share one preparation and one forward pass; an option that works in one of them must work in the others.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kdcache.config import build
from kdcache.dump import dump_teacher
from kdcache.students import StudentConfig
from kdcache.students.run_file import read_run
from kdcache.sweep import SweepConfig, preview_sweep
from kdcache.train import TrainConfig, preview_training, train_student
from tests.task_models import TINY_TASKS, bert, bert_tokenizer, dump_config
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences

#: Task, and the student's settings; the words in braces are the fixture's directories.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "size": ("causal-lm", {"size": "nano"}),
    "config_file": ("causal-lm", {"config_file": "{config}"}),
    "model": ("causal-lm", {"model": "{base}"}),
    "revision": ("causal-lm", {"model": "{base}", "revision": "main"}),
    "seed": ("causal-lm", {"size": "nano", "seed": 5}),
    "dtype": ("causal-lm", {"model": "{base}", "dtype": "bfloat16"}),
    "keep_layers": ("causal-lm", {"model": "{base}", "keep_layers": [1]}),
    "lora": ("causal-lm", {"model": "{base}", "lora": {"rank": 2, "target_modules": ["q_proj"]}}),
    "projection": ("embedding", {"model": "{narrow}", "projection": True}),
    "pca": ("embedding", {"model": "{narrow}", "pca": True}),
    "encoder": ("ranking", {"model": "{embedder}", "encoder": "bi-encoder"}),
    "bi_encoder": ("ranking", {"model": "{embedder}", "encoder": "bi-encoder", "bi_encoder": {"similarity": "dot"}}),
}


def test_every_option_is_tried():
    assert set(OPTIONS) == set(StudentConfig.model_fields)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where caches and models are."""
    path = tmp_path_factory.mktemp("options")
    tokenizer = bpe_tokenizer()
    sequences = random_sequences(6, len(tokenizer), seed=1)
    make_cache(path / "causal-lm", llama(len(tokenizer), seed=5), tokenizer, sequences)
    base = llama(len(tokenizer), seed=2)
    base.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **_sizes(base.config)}))
    for task in ("embedding", "ranking"):
        made = TINY_TASKS[task].write(path / f"{task}-models")
        dump_teacher(dump_config(task, made, path / task), progress=False)
    for name, width in (("narrow", 8), ("embedder", 16)):
        bert("BertModel", width=width, num_layers=1, seed=3).save_pretrained(path / name)
        bert_tokenizer().save_pretrained(path / name)
    return {name: str(path / name) for name in ("causal-lm", "embedding", "ranking", "base", "narrow", "embedder")} | {
        "config": str(path / "config.json")
    }


def _sizes(config: Any) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in names}


def settings_of(option: str, found: dict[str, str]) -> dict[str, Any]:
    task, student = OPTIONS[option]
    filled = {name: value.format(**found) if isinstance(value, str) else value for name, value in student.items()}
    return {"cache": found[task], "student": filled, "max_steps": 1, "batch_sequences": 64, "device": "cpu"}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_works_with_a_report_in_a_dry_run_and_in_a_sweep(option, found, tmp_path, capfd):
    settings = settings_of(option, found)
    config = build(TrainConfig, {**settings, "output": str(tmp_path / "run")})
    plan = preview_sweep(build(SweepConfig, {"output": str(tmp_path / "sweep"), "base": settings})).runs[0]
    report = preview_training(config)
    result = train_student(config, progress=True)
    summary = capfd.readouterr().err
    assert f"student {report.student}, {report.num_trainable_parameters:,} parameters to train" in summary
    assert result.steps == plan.steps == report.steps == 1
    record = read_run(tmp_path / "run")
    assert record is not None
    assert record["student"]["num_parameters"] == plan.num_parameters == report.num_parameters
    assert build(TrainConfig, record["config"]).student == config.student
    assert list(plan.to_dict()["objective"]) == list(report.objective)
    # All three say what was trained on.
    trained = {name: part for name, part in record["config"]["objective"].items() if part is not None}
    assert trained.keys() == result.losses.keys() - {"loss"} == report.objective.keys()
    # The first step is over the whole cache, as the report's sample is, so both have the same losses.
    for term in report.terms:
        assert result.losses[term.name] == pytest.approx(term.value, rel=1e-2 if option == "dtype" else 1e-4)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("option", ["model", "pca"])
def test_settings_of_the_run_go_with_them(option, changes, found, tmp_path, capfd):
    settings = settings_of(option, found) | changes
    config = build(TrainConfig, {**settings, "output": str(tmp_path / "run")})
    assert preview_sweep(build(SweepConfig, {"output": str(tmp_path / "sweep"), "base": settings})).runs[0].steps == 1
    report = preview_training(config)
    train_student(config, progress=True)
    assert f"student {report.student}" in capfd.readouterr().err


@pytest.mark.parametrize("option", ["model", "keep_layers", "pca", "projection"])
def test_the_report_leaves_no_trace(option, found, tmp_path, capfd):
    weights = []
    for progress in (True, False):
        output = tmp_path / str(progress)
        train_student(build(TrainConfig, {**settings_of(option, found), "output": str(output)}), progress=progress)
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
