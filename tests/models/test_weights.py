from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from kdcache.models.weights import weights_sha256
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
