from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.errors import ConfigError, StudentError
from kdcache.students import SIZES, StudentConfig, load_student
from kdcache.students.load import _is_causal
from kdcache.students.sizes import REFERENCE_VOCAB_SIZE, llama_config
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences, word_tokenizer

TOKENIZER = bpe_tokenizer()
VOCAB_SIZE = len(TOKENIZER)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "cache"
    return open_cache(make_cache(path, llama(VOCAB_SIZE), TOKENIZER, random_sequences(4, VOCAB_SIZE), num_shards=1))


def load(cache, **settings):
    return load_student(build(StudentConfig, settings), cache.manifest, cache.tokenizer_dir())


def save(model, path, tokenizer=TOKENIZER):
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_documented_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(SIZES[name], REFERENCE_VOCAB_SIZE))
    assert model.num_parameters() == SIZES[name].num_parameters


def test_fresh_student_takes_ids_and_length_from_the_cache(cache):
    student = load(cache, size="nano")
    config = student.model.config
    assert config.vocab_size == cache.manifest.tokenizer.vocab_size == VOCAB_SIZE
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    assert config.max_position_embeddings >= 16
    assert student.head.vocab_size == VOCAB_SIZE
    assert student.model.dtype == torch.float32


def test_seed_decides_the_weights(cache):
    def weights(seed):
        return load(cache, size="nano", seed=seed).model.get_input_embeddings().weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_fresh_student_from_a_configuration_file(cache, tmp_path, suffix):
    file = tmp_path / f"student.{suffix}"
    file.write_text(json.dumps({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 4}))
    student = load(cache, config_file=str(file), dtype="bfloat16")
    assert isinstance(student.model, GPT2LMHeadModel)
    assert student.model.dtype == torch.bfloat16
    assert student.model.config.n_positions == 16, "raised to the cache's longest sequence"
    assert student.model.config.vocab_size == VOCAB_SIZE


def test_pretrained_student_with_padding_rows(cache, tmp_path):
    path = save(llama(VOCAB_SIZE + 10, seed=1), tmp_path / "student")
    student = load(cache, model=path)
    assert student.head.vocab_size == VOCAB_SIZE
    assert student.model.config.vocab_size == VOCAB_SIZE, "what is trained is what is saved"


def test_student_without_tokenizer_files_is_taken_on_trust_and_says_so(cache, tmp_path, caplog):
    path = save(llama(VOCAB_SIZE), tmp_path / "student", tokenizer=None)
    with caplog.at_level(logging.WARNING):
        student = load(cache, model=path)
    assert "no tokenizer files" in caplog.text
    assert student.tokenizer.get_vocab() == TOKENIZER.get_vocab(), "the cache's tokenizer is saved with it"


def test_student_with_another_eos_fits_and_says_so(cache, tmp_path, caplog):
    path = save(llama(VOCAB_SIZE), tmp_path / "student", bpe_tokenizer(eos_token="<s>"))
    with caplog.at_level(logging.WARNING):
        load(cache, model=path)
    assert "ends a text with '<s>', the teacher of the cache with '</s>'" in caplog.text
    caplog.clear()
    load(cache, model=save(llama(VOCAB_SIZE), tmp_path / "same"))
    assert caplog.text == ""


def bert(kind):
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return kind(config)


def gpt2(**settings):
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2, **settings))


class TestRefused:
    def refuse(self, cache, match, **settings):
        with pytest.raises(StudentError, match=match) as error:
            load(cache, **settings)
        assert "\n" not in str(error.value)

    def test_missing_path(self, cache):
        self.refuse(cache, "there is no model at ./no/such/student", model="./no/such/student")

    def test_unreachable_hub_name(self, cache):
        self.refuse(cache, "cannot load nobody/nothing", model="nobody/nothing")

    def test_directory_without_a_model(self, cache, tmp_path):
        self.refuse(cache, "cannot load .*config", model=str(tmp_path))

    def test_damaged_weights(self, cache, tmp_path):
        path = save(llama(VOCAB_SIZE), tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"not weights")
        self.refuse(cache, "cannot load", model=path)

    def test_damaged_tokenizer(self, cache, tmp_path):
        path = save(llama(VOCAB_SIZE), tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        self.refuse(cache, "cannot load", model=path)

    def test_other_tokenizer(self, cache, tmp_path):
        path = save(llama(VOCAB_SIZE), tmp_path, bpe_tokenizer(lowercase=True))
        self.refuse(cache, "another tokenizer than the cache: normaliser differs", model=path)

    def test_other_words(self, cache, tmp_path):
        path = save(llama(VOCAB_SIZE), tmp_path, word_tokenizer(["a", "b"]))
        self.refuse(cache, f"vocabulary size 5 against {VOCAB_SIZE}; id 0 is '<unk>' against '<s>'", model=path)

    def test_vocabulary_too_small(self, cache, tmp_path):
        path = save(llama(VOCAB_SIZE - 1), tmp_path, tokenizer=None)
        self.refuse(cache, f"knows {VOCAB_SIZE - 1} token ids, but the cache uses {VOCAB_SIZE}", model=path)

    def test_too_few_positions(self, cache, tmp_path):
        self.refuse(cache, "at most 8 positions.*up to 16", model=save(gpt2(n_positions=8), tmp_path))

    def test_model_without_a_language_model_head(self, cache, tmp_path):
        path = save(bert(BertForSequenceClassification), tmp_path)
        self.refuse(cache, "not a causal language model", model=path)

    def test_model_of_another_task(self, cache, tmp_path):
        self.refuse(cache, "BertForMaskedLM, not a causal language model", model=save(bert(BertForMaskedLM), tmp_path))

    def test_model_that_lacks_weights(self, cache, tmp_path):
        path = save(llama(VOCAB_SIZE), tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        self.refuse(cache, "lacks 1 of the weights", model=path)

    def test_bidirectional_model(self, cache, tmp_path):
        file = tmp_path / "student.yaml"
        file.write_text("model_type: bert\nhidden_size: 16\nnum_attention_heads: 2\nintermediate_size: 32\n")
        self.refuse(cache, "BertLMHeadModel", config_file=str(file))

    def test_model_that_sees_the_future(self, cache, tmp_path, monkeypatch):
        path = save(llama(VOCAB_SIZE), tmp_path)
        body = type(llama(VOCAB_SIZE).model)
        forward = body.forward

        def leaky(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
            return output

        monkeypatch.setattr(body, "forward", leaky)
        self.refuse(cache, "later tokens", model=path)

    def test_head_that_is_no_linear_map(self, cache, monkeypatch):
        monkeypatch.setattr("kdcache.models.bodies.split_model", lambda model: None)
        self.refuse(cache, "cannot be split", size="nano")

    def test_unknown_architecture(self, cache, tmp_path):
        file = tmp_path / "student.yaml"
        file.write_text("model_type: llamma\nhidden_size: 16\n")
        self.refuse(cache, "unknown model_type 'llamma'; did you mean 'llama'", config_file=str(file))

    def test_impossible_sizes(self, cache, tmp_path):
        file = tmp_path / "student.yaml"
        file.write_text("model_type: gpt2\nn_embd: 15\nn_head: 2\nn_layer: 1\n")
        self.refuse(cache, "cannot build student", config_file=str(file))

    def test_encoder_decoder(self, cache, tmp_path):
        file = tmp_path / "student.yaml"
        file.write_text("model_type: t5\nd_model: 16\n")
        self.refuse(cache, "cannot build student", config_file=str(file))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "exactly one of model, config_file and size, found none"),
        ({"size": "nano", "model": "x"}, "found model and size"),
        ({"size": "smal"}, "unknown student size 'smal'; did you mean 'small'"),
        ({"size": "nano", "revision": "main"}, "revision needs model"),
        ({"size": "nano", "dtype": "float12"}, "dtype"),
    ],
)
def test_settings_that_make_no_sense(settings, match):
    with pytest.raises(ConfigError, match=match):
        build(StudentConfig, settings)


def test_configuration_file_without_architecture(cache, tmp_path):
    file = tmp_path / "student.yaml"
    file.write_text("hidden_size: 16\n")
    with pytest.raises(ConfigError, match="no 'model_type'"):
        load(cache, config_file=str(file))


@pytest.mark.parametrize("as_directory", [True, False])
def test_a_config_that_transformers_saved(tmp_path, cache, as_directory):
    # rms_norm_eps is written as 1e-05, which YAML takes for a text.
    llama(VOCAB_SIZE, rms_norm_eps=1e-05).config.save_pretrained(tmp_path / "saved")
    assert "1e-05" in (tmp_path / "saved" / "config.json").read_text()
    path = tmp_path / "saved" if as_directory else tmp_path / "saved" / "config.json"
    student = load_student(StudentConfig(config_file=str(path)), cache.manifest, cache.tokenizer_dir())
    assert student.model.config.rms_norm_eps == 1e-05


@pytest.mark.parametrize("spread", [0.005, 0.02])
def test_a_body_that_reads_ahead_is_noticed_however_small_its_weights(spread):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    body = BertModel(BertConfig(vocab_size=VOCAB_SIZE, initializer_range=spread, **sizes))
    assert not _is_causal(body, body, VOCAB_SIZE)
