"""Models whose files do not fit together, or are no files: refused by name, before anything is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kdcache.errors import StudentError, TeacherError
from kdcache.models.loading import load_config, load_model, load_tokenizer
from kdcache.tasks import task_of
from tests.loops import loop
from tests.task_models import bert, t5
from tests.tiny import llama

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def copied(teacher_dir, tmp_path):
    shutil.copytree(teacher_dir, tmp_path / "model")
    return tmp_path / "model"


def changed(path: Path, **settings: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))


def load(path: Path, task: str = "causal-lm", error: type = TeacherError, **more: object):
    return load_model(str(path), task_of(task), dtype=None, error=error, **more)


FEWER = {
    "llama": (
        "causal-lm",
        lambda: llama(40),
        {"num_hidden_layers": 1, "layer_types": None},
        "layers.1.input_layernorm",
    ),
    "bert": ("masked-lm", lambda: bert("BertForMaskedLM"), {"num_hidden_layers": 1}, "layer.1.attention"),
    "bert as embedder": ("embedding", lambda: bert("BertForMaskedLM"), {"num_hidden_layers": 1}, "layer.1.attention"),
    "classifier": (
        "sequence-classification",
        lambda: bert("BertForSequenceClassification", num_labels=3),
        {"num_hidden_layers": 1},
        "layer.1.attention",
    ),
    "t5 decoder": ("seq2seq-lm", t5, {"num_decoder_layers": 1}, "decoder.block.1.layer"),
}


@loop("case", FEWER)
@loop("error", [TeacherError, StudentError])
def test_a_configuration_of_fewer_layers_than_the_weights(case, error, tmp_path_factory):
    task, make, settings, key = FEWER[case]
    path = tmp_path_factory.mktemp("fewer")
    make().save_pretrained(path)
    load(path, task, error)
    changed(path, **settings)
    with pytest.raises(error, match=rf"has \d+ weights that its config.json has no place for, such as .*{key}"):
        load(path, task, error, may_lack_head=error is StudentError)


def test_weights_in_a_layer_that_another_architecture_would_use(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(vocab_size=40, num_key_value_heads=2, **sizes)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    changed(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(TeacherError, match=r"has 3 weights .*self_attn.k_proj.bias"):
        load(tmp_path)


def test_weights_that_may_be_left_over(tmp_path):
    """Heads of other tasks, encoders of something else, tables that older versions stored, layers that look ahead."""
    llama(40).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    more = [
        "vision_tower.layers.0.norm.weight",
        "score.weight",
        "mtp.0.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.2.mlp.up_proj.weight",
    ]
    save_file(weights | {key: torch.zeros(2) for key in more}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TeacherError, match=r"has 1 weight .*model.layers.2.mlp.up_proj.weight"):
        load(tmp_path)
    changed(tmp_path, num_nextn_predict_layers=1)
    load(tmp_path)
    bert("BertForPreTraining").save_pretrained(tmp_path / "bert")
    for task in ("masked-lm", "embedding"):
        load(tmp_path / "bert", task)
    load(tmp_path / "bert", "sequence-classification", StudentError, may_lack_head=True)


@loop("task", ["causal-lm", "embedding", "masked-lm"])
@loop("error", [TeacherError, StudentError])
def test_weights_that_are_missing(task, error, tmp_path_factory):
    path = tmp_path_factory.mktemp("missing")
    make = {"causal-lm": lambda: llama(40), "embedding": lambda: bert("BertModel")}
    make.get(task, lambda: bert("BertForMaskedLM"))().save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    lost = next(key for key in weights if ("layers.1." in key or "layer.1." in key) and key.endswith("weight"))
    kept = {key: value for key, value in weights.items() if key != lost}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=rf"lacks 1 of the weights of a .*, such as .*{lost}"):
        load(path, task, error, may_lack_head=error is StudentError)


def test_a_vocabulary_of_another_size_is_named_with_both(copied):
    changed(copied, vocab_size=600)
    with pytest.raises(TeacherError, match=r"embed_tokens.weight is \[\d+, 16\] there, and \[600, 16\] by its config"):
        load(copied)


@loop("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs_are_told(file, teacher_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("lfs") / "model"
    shutil.copytree(teacher_dir, path)
    (path / file).write_text(POINTER)
    make = {"model.safetensors": load, "config.json": lambda p: load_config(str(p), error=TeacherError)}
    with pytest.raises(TeacherError, match=rf"model: its {file} is a pointer of git-lfs .*run git lfs pull"):
        make.get(file, lambda p: load_tokenizer(str(p), error=TeacherError))(path)


@loop("file", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_file_that_is_cut_is_named(file, teacher_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "model"
    shutil.copytree(teacher_dir, path)
    (path / file).write_bytes((path / file).read_bytes()[:-20])
    read = load if file.startswith("model") else lambda p: load_tokenizer(str(p), error=TeacherError)
    with pytest.raises(TeacherError, match=rf"its {file} (is no JSON|cannot be read) .*download the model again"):
        read(path)


def test_a_model_without_a_tokenizer(copied):
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TeacherError, match=r"model: it has no tokenizer \(tokenizer.json, .*\); copy these files"):
        load_tokenizer(str(copied), error=TeacherError)


def test_an_activation_that_there_is_not(copied):
    changed(copied, hidden_act="nope")
    with pytest.raises(TeacherError, match=r"config.json sets hidden_act to nope, which the installed transformers"):
        load(copied)
