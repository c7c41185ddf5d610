from __future__ import annotations

import json

import pytest
import torch
import transformers

from kdcache.errors import ConfigError, TeacherError
from kdcache.models.loading import load_config, load_model, load_tokenizer, parse_dtype, pick_device
from kdcache.tasks import task_of
from tests.loops import loop
from tests.tiny import llama


def load(path, dtype=None):
    return load_model(str(path), task_of("causal-lm"), dtype=dtype, error=TeacherError)


def test_a_directory(teacher_dir):
    model = load(teacher_dir)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert next(load(teacher_dir, torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert len(load_tokenizer(str(teacher_dir))) < model.config.vocab_size


def test_the_checkpoints_own_dtype(tmp_path):
    llama(40).half().save_pretrained(tmp_path)
    assert next(load(tmp_path).parameters()).dtype == torch.float16


@loop("name", ["/no/such/model", "./missing", "missing.gguf"])
def test_nothing_there(name):
    with pytest.raises(TeacherError, match=f"there is no model at {name}"):
        load(name)
    if not name.endswith(".gguf"):
        with pytest.raises(TeacherError, match=f"there is no model at {name}"):
            load_tokenizer(name, error=TeacherError)


def test_a_hub_id_that_cannot_be_reached():
    with pytest.raises(TeacherError, match=r"cannot load nobody/nothing \(not a local path; as a hub id"):
        load("nobody/nothing")


def test_an_encoder(tmp_path):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"is a BertForMaskedLM, not a causal language model"):
        load(tmp_path)


def test_an_encoder_decoder(tmp_path):
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"is an encoder-decoder \(t5\), not a causal language model"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "no config", "bad config", "unknown type", "empty"])
def test_a_damaged_checkpoint(tmp_path, damage):
    llama(40).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no config":
        config.unlink()
    elif damage == "bad config":
        config.write_text("{")
    elif damage == "unknown type":
        config.write_text(json.dumps({"model_type": "abacus"}))
    else:
        for path in tmp_path.iterdir():
            path.unlink()
    with pytest.raises(TeacherError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n" not in message


def test_a_checkpoint_that_lacks_a_weight(tmp_path):
    model = llama(40)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(TeacherError, match="up_proj"):
        load(tmp_path)


def test_a_directory_without_a_tokenizer(tmp_path):
    llama(40).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"cannot load .*"):
        load_tokenizer(str(tmp_path), error=TeacherError)


HOSTILE = {
    "load_model": lambda path: load(path),
    "load_config": lambda path: load_config(str(path), error=TeacherError),
    "load_tokenizer": lambda path: load_tokenizer(str(path), error=TeacherError),
}


@pytest.mark.parametrize("loader", HOSTILE)
def test_code_from_a_repository_is_never_run(tmp_path, monkeypatch, loader):
    llama(40).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w').write('ran')\n")
    questions = []
    # What transformers asks on standard input before it runs the code; a pipe may well say yes.
    monkeypatch.setattr("builtins.input", lambda *prompt: questions.append(prompt) or "y")
    with pytest.raises(TeacherError, match=r"needs Python code from its own repository .* never runs; use a model"):
        HOSTILE[loader](tmp_path)
    assert questions == []
    assert not (tmp_path / "proof").exists()


def test_a_known_architecture_is_loaded_by_the_librarys_own_class(tmp_path, monkeypatch):
    llama(40).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w').write('ran')\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    assert type(load(tmp_path)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "proof").exists()


def test_settings():
    assert parse_dtype("bf16") is torch.bfloat16
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match=r"unknown dtype 'bfloat61'; did you mean 'bfloat16'"):
        parse_dtype("bfloat61")
    for name in ("cuda:99", "tpu", ""):
        with pytest.raises(ConfigError, match=f"device '{name}' cannot be used"):
            pick_device(name)
