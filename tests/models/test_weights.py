from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.models import weights
from kdcache.models.weights import remembered_sha256, weights_sha256
from tests.tiny import llama


def test_the_same_weights_have_the_same_hash_wherever_they_lie(tmp_path):
    model = llama(40)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert weights_sha256(loaded) == weights_sha256(model) == weights_sha256(llama(40))
    assert len(weights_sha256(model)) == 64


def test_any_change_of_weights_changes_the_hash():
    hashes = {weights_sha256(llama(40)), weights_sha256(llama(40, seed=1)), weights_sha256(llama(40).bfloat16())}
    model = llama(40)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nextafter(model.model.norm.weight[3], torch.tensor(9.0))
    hashes.add(weights_sha256(model))
    swapped = llama(40)
    layers = swapped.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    hashes.add(weights_sha256(swapped))
    assert len(hashes) == 5


def test_a_transposed_weight_is_another():
    linear = torch.nn.Linear(4, 2, bias=False)
    other = torch.nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        other.weight.copy_(linear.weight.reshape(4, 2))
    assert weights_sha256(linear) != weights_sha256(other)


@pytest.fixture
def hashed(monkeypatch):
    """How often weights were hashed."""
    calls = []
    monkeypatch.setattr(weights, "weights_sha256", lambda model: calls.append(1) or weights_sha256(model))
    return calls


def test_a_hash_is_remembered_while_the_files_stay(tmp_path, hashed):
    model = llama(40)
    model.save_pretrained(tmp_path)
    found = {remembered_sha256(model, str(tmp_path)) for _ in range(3)}
    assert found == {weights_sha256(model)}
    assert len(hashed) == 1
    other = llama(40, seed=1)
    other.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert remembered_sha256(other, str(tmp_path)) == weights_sha256(other)
    assert len(hashed) == 2
    remembered_sha256(other.bfloat16(), str(tmp_path))
    assert len(hashed) == 3, "another dtype is another hash"


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"a": 1}'])
def test_a_damaged_memory_only_costs_time(tmp_path, monkeypatch, hashed, content):
    store = tmp_path / "store"
    monkeypatch.setenv("KDCACHE_STORE", str(store))
    if content is None:
        store.write_text("a file where the directory should be")
    else:
        store.mkdir()
        (store / "weights.json").write_text(content)
    model = llama(40)
    model.save_pretrained(tmp_path / "model")
    for _ in range(2):
        assert remembered_sha256(model, str(tmp_path / "model")) == weights_sha256(model)
    assert len(hashed) == (2 if content is None else 1)


def test_a_model_of_unknown_origin_is_hashed_every_time(hashed):
    assert [remembered_sha256(llama(40), "nobody/nothing") for _ in range(2)] == [weights_sha256(llama(40))] * 2
    assert len(hashed) == 2
