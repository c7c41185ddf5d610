"""Targets of the kind hidden: training from the cache is training with the teacher live, at every temperature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kdcache.cache import Cache, open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import ConfigError, TeacherError
from kdcache.losses import Objective, ObjectiveConfig, TeacherRows
from kdcache.losses.from_cache import context_of
from kdcache.models.lm_head import LMHead, split_model
from kdcache.torch_data import to_tensors
from tests.families import SPLITTABLE
from tests.tiny import bpe_tokenizer, llama

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
#: Largest relative difference of loss and gradient from the live teacher, by (dtype of the teacher, hidden codec).
TOLERANCES = {
    ("float32", "exact"): 1e-5,
    # The stored states are the live ones to the bit; the logits of another batch shape may round differently.
    ("bfloat16", "bf16"): 5e-3,
    ("float32", "bf16"): 2e-2,
    ("float32", "int8"): 0.1,
}


def dump(tmp_path: Path, teacher: Path, corpus_file: Path, dtype: str, codec: str) -> Cache:
    values = {
        "output": str(tmp_path / "cache"),
        "teacher": {"model": str(teacher), "device": "cpu", "dtype": dtype},
        "corpus": {"paths": [str(corpus_file)]},
        "sequences": {"max_length": 16},
        "targets": {"kind": "hidden"},
        "hidden_states": {"codec": codec},
        "shard_positions": 60,
    }
    dump_teacher(build(DumpConfig, values), progress=False)
    return open_cache(str(tmp_path / "cache"))


def live_logits(teacher: Path, dtype: str, tokens: list[np.ndarray], vocab_size: int) -> torch.Tensor:
    """All logits of the whole model, sequence by sequence, over the true vocabulary."""
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        found = [model(input_ids=torch.from_numpy(t[:-1].astype(np.int64))[None]).logits[0] for t in tokens]
    return torch.cat(found)[:, :vocab_size].float()


def live_loss(student: Any, tokens: list[np.ndarray], mask_P: torch.Tensor, z_PV: torch.Tensor, t: float) -> Any:
    """T^2 KL(softmax(z / T) || softmax(x / T)) over whole rows of logits, written plainly."""
    logits = [student(input_ids=torch.from_numpy(s[:-1].astype(np.int64))[None]).logits[0] for s in tokens]
    x_PV = torch.cat(logits)
    teacher_PV, student_PV = (z_PV / t).log_softmax(1), (x_PV / t).log_softmax(1)[:, : z_PV.shape[1]]
    return (t**2 * (teacher_PV.exp() * (teacher_PV - student_PV)).sum(1))[mask_P].mean()


def cached_loss(student: Any, head: LMHead, cache: Cache, indices: range, temperature: float) -> torch.Tensor:
    batch = to_tensors(cache.read(indices), pad_id=0)
    config = build(ObjectiveConfig, {"forward_kl": {"weight": 1.0, "temperature": temperature}, "cross_entropy": None})
    objective = Objective(config, context=context_of(cache), chunk_positions=7)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = student.base_model(**inputs).last_hidden_state.flatten(0, 1)[batch["rows"]]
    return objective(hidden, head, TeacherRows.from_batch(batch), batch["loss_mask"].sum()).loss


def check(teacher: Path, cache: Cache, dtype: str, codec: str) -> None:
    student = llama(len(bpe_tokenizer()) + 3, seed=5, width=8)
    split = split_model(student)
    assert split is not None
    indices = range(len(cache))
    batch = cache.read(indices)
    tokens = np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])
    mask_P = torch.from_numpy(batch.loss_mask_P.astype(bool))
    z_PV = live_logits(teacher, dtype, tokens, cache.vocab_size)
    for temperature in TEMPERATURES:
        found = []
        for loss in (
            live_loss(student, tokens, mask_P, z_PV, temperature),
            cached_loss(student, split[1], cache, indices, temperature),
        ):
            student.zero_grad()
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
            found.append((loss.detach(), gradient.clone()))
        (expected, expected_gradient), (value, gradient) = found
        tolerance = TOLERANCES[dtype, codec]
        assert value.item() == pytest.approx(expected.item(), rel=tolerance), temperature
        difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
        assert difference <= tolerance, (temperature, difference)


@pytest.mark.parametrize(("dtype", "codec"), list(TOLERANCES))
def test_loss_and_gradient_are_those_of_the_live_teacher(tmp_path, teacher_dir, corpus_file, dtype, codec):
    check(teacher_dir, dump(tmp_path, teacher_dir, corpus_file, dtype, codec), dtype, codec)


@pytest.mark.parametrize("family", SPLITTABLE)
def test_every_family_whose_head_can_be_split(tmp_path, corpus_file, family):
    teacher = tmp_path / "teacher"
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(teacher)
    SPLITTABLE[family](len(tokenizer) + 9).save_pretrained(teacher)
    check(teacher, dump(tmp_path, teacher, corpus_file, "float32", "exact"), "float32", "exact")


def test_a_teacher_without_a_head_of_its_own_is_refused(tmp_path, teacher_dir, corpus_file, monkeypatch):
    monkeypatch.setattr("kdcache.models.bodies.split_model", lambda model: None)
    with pytest.raises(TeacherError, match="cannot be rebuilt from it; use --targets top-k"):
        dump(tmp_path, teacher_dir, corpus_file, "float32", "exact")
    assert not (tmp_path / "cache" / "plan.json").exists()


def test_contradictions_are_named(tmp_path):
    values = {"output": "x", "teacher": {"model": "m"}, "corpus": {"paths": ["c"]}}
    for targets, words in (
        ({"kind": "hidden", "num_samples": 5}, "take no samples"),
        ({"kind": "hidden", "temperatures": [2]}, "no temperatures of the tail"),
        ({"kind": "hiden"}, "hiden"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(DumpConfig, {**values, "targets": targets})
