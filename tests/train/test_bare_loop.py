"""The recipe without the Trainer: the Trainer's weights, also after an interruption."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import relative_difference, settings, train

RECIPE = Path(__file__).parents[2] / "pipelines" / "bare_loop" / "train.py"
STUDENT = {"size": "nano", "seed": 1}
OBJECTIVE = {"forward_kl": {"weight": 0.7, "temperature": 2.0}, "cross_entropy": {"weight": 0.3}}
STEPS = 9


@pytest.fixture(scope="module")
def bare(cache: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Run the recipe and return the weights that it saved."""
    spec = importlib.util.spec_from_file_location("bare_loop", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(output: Path, **changes) -> dict[str, torch.Tensor]:
        values = {"student": STUDENT, "objective": OBJECTIVE, "steps": STEPS, "seed": 3, **changes}
        module.train(str(cache), str(output), **values)
        return weights(output)

    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    # An epoch is two steps of 8 sequences and one of 5.
    tokenizer = bpe_tokenizer()
    sequences = random_sequences(21, len(tokenizer), seed=1)
    return make_cache(tmp_path_factory.mktemp("bare") / "cache", llama(len(tokenizer), seed=5), tokenizer, sequences)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def trainers_weights(cache: Path, output: Path, **changes) -> dict[str, torch.Tensor]:
    same = {"student": STUDENT, "objective": OBJECTIVE, "max_steps": STEPS, "schedule": "cosine", "seed": 3}
    train(settings(cache, output, warmup_ratio=0.05, max_grad_norm=1.0, learning_rate=1e-3, **same, **changes))
    return weights(output)


def test_weights_are_the_trainers_to_the_bit(bare, cache, tmp_path) -> None:
    expected = trainers_weights(cache, tmp_path / "trainer")
    found = bare(tmp_path / "bare")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert relative_difference(found, bare(tmp_path / "untrained", steps=0)) > 1e-2


def test_accumulation_is_the_trainers_up_to_rounding(bare, cache, tmp_path) -> None:
    expected = trainers_weights(cache, tmp_path / "trainer", batch_sequences=4, gradient_accumulation=2)
    assert relative_difference(bare(tmp_path / "bare", batch_sequences=4, accumulation=2), expected) < 1e-6


def test_goes_on_from_its_checkpoint_to_the_bit(bare, tmp_path, monkeypatch) -> None:
    expected = bare(tmp_path / "whole")
    replace = os.replace

    def interrupt(source: object, target: object) -> None:
        replace(source, target)
        if str(target).endswith("checkpoint.pt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    # After steps 4 and 8, in the middle of an epoch, and after the last one.
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            bare(tmp_path / "interrupted", save_steps=4)
        assert not (tmp_path / "interrupted" / "model.safetensors").exists()
    found = bare(tmp_path / "interrupted", save_steps=4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("arguments", "message"), [([], "nothing"), (["--size", "hug"], "hug")])
def test_mistakes_are_told_in_a_line(arguments, message, cache, tmp_path, monkeypatch) -> None:
    source = str(cache) if arguments else str(tmp_path / "nothing")
    monkeypatch.setattr(sys, "argv", [str(RECIPE), source, str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{message}[^\n]*$"):
        runpy.run_path(str(RECIPE), run_name="__main__")
