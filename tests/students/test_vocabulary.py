"""The vocabulary of a saved student is the tokenizer's: its rows, the ids that end and pad texts, its chat template."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from kdcache.cache import open_cache
from kdcache.errors import StudentError
from kdcache.evaluate import evaluate_students
from kdcache.students.vocabulary import align_special_ids, trim_rows
from kdcache.tasks import TASKS
from kdcache.tasks.causal_lm import CausalLM
from tests import families
from tests.loops import loop
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import settings, train

TOKENIZER = bpe_tokenizer()
IDS, ROWS = len(TOKENIZER), 320
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def bert():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=ROWS, hidden_size=16, **sizes))
    torch.nn.init.normal_(model.cls.predictions.bias)
    return model


def bart():
    sizes = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in SIZES_OF_HALF.items()}
    model = BartForConditionalGeneration(BartConfig(vocab_size=ROWS, d_model=16, max_position_embeddings=32, **sizes))
    model.final_logits_bias.normal_()
    return model


SIZES_OF_HALF = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def t5():
    """A checkpoint with two matrices, whose configuration says that they are one."""
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=ROWS, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    model.lm_head.weight = torch.nn.Parameter(torch.randn(ROWS, 16))
    return model


MODELS = {
    "tied llama": lambda: llama(ROWS),
    "pads with one of the rows": lambda: llama(ROWS, pad_token_id=ROWS - 1),
    "as wide as its rows": lambda: llama(ROWS, width=ROWS),
    "gpt2": lambda: families.gpt2(ROWS),
    "bert": bert,
    "bart": bart,
    "t5 with a head of its own": t5,
}


def logits(model):
    ids = torch.tensor([[5, 280, 7]])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


@loop("name", MODELS)
def test_rows_that_no_id_has_are_cut_and_all_else_stays(tmp_path, caplog, name):
    torch.manual_seed(0)
    model = MODELS[name]()
    before, count = logits(model), sum(parameter.numel() for parameter in model.parameters())
    with caplog.at_level(logging.WARNING):
        trim_rows(model, IDS, "NAME")
    assert "student NAME has rows for 320 ids, and its tokenizer has 290." in caplog.text
    torch.testing.assert_close(logits(model), before[..., :IDS], rtol=1e-5, atol=1e-5)
    assert count > sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / name)
    again = type(model).from_pretrained(tmp_path / name)
    assert again.config.vocab_size == IDS
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    caplog.clear()
    trim_rows(model, IDS, "NAME")
    assert not caplog.text, "there is nothing left to remove"


def test_an_architecture_that_cannot_be_cut(monkeypatch):
    model = llama(ROWS)
    monkeypatch.setattr("kdcache.students.vocabulary.model_from_config", lambda *given: llama(ROWS))
    with pytest.raises(StudentError, match=r"LlamaForCausalLM\) has more rows than the 290 ids .*\(320 stay\); choose"):
        trim_rows(model, IDS, "NAME")


# ------------------------------------------------------------------------------------------ a student and its cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    sequences = random_sequences(16, IDS, seed=1)
    return make_cache(tmp_path_factory.mktemp("cache") / "c", llama(IDS, seed=5), TOKENIZER, sequences)


def save(model, path, tokenizer=TOKENIZER):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return {"model": str(path)}


@pytest.mark.parametrize("lora", [False, True])
def test_the_saved_students_own_loss_is_that_of_evaluate(tmp_path, cache, lora, caplog):
    student = save(llama(ROWS, seed=2), tmp_path / "student") | ({"lora": {"rank": 2, "alpha": 4.0}} if lora else {})
    train(settings(cache, tmp_path / "run", student=student, max_steps=20, learning_rate=0.01))
    with caplog.at_level(logging.WARNING):
        padded, trained = evaluate_students(
            str(cache), [student["model"], str(tmp_path / "run")], device="cpu", progress=False
        ).students
    assert trained.loss == pytest.approx(own_loss(cache, tmp_path / "run"), rel=1e-5)
    assert padded.loss < own_loss(cache, tmp_path / "student") - 0.01
    assert "the model itself gives them probability, so its own loss is higher" in caplog.text


def own_loss(path, directory):
    """The loss of a model by its own softmax, without kdcache."""
    model, cache = AutoModelForCausalLM.from_pretrained(directory).eval(), open_cache(str(path))
    total, count = 0.0, 0
    for index in range(len(cache)):
        read = cache.read([index])
        tokens = torch.tensor(read.tokens_T.astype("int64"))
        with torch.no_grad():
            logprobs = model(tokens[None, :-1]).logits[0].log_softmax(-1)
        mask = torch.tensor(read.loss_mask_P > 0)
        total -= float(logprobs.gather(1, tokens[1:, None])[:, 0][mask].double().sum())
        count += int(mask.sum())
    return total / count


def test_special_ids_and_chat_template_of_the_saved_student(tmp_path, cache):
    own = bpe_tokenizer(eos_token="<s>")
    own.chat_template = TEMPLATE
    model = llama(IDS, seed=2)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    train(settings(cache, tmp_path / "run", student=save(model, tmp_path / "student", own), max_steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert (tokenizer.eos_token_id, saved.config.eos_token_id, saved.generation_config.eos_token_id) == (1, 1, 1)
    assert (tokenizer.bos_token_id, saved.config.bos_token_id, saved.generation_config.bos_token_id) == (0, 0, 0)
    assert tokenizer.chat_template == TEMPLATE


def test_a_chat_template_of_the_teacher_comes_first_and_that_is_said(tmp_path, caplog):
    of_teacher, own = bpe_tokenizer(), bpe_tokenizer()
    of_teacher.chat_template, own.chat_template = "{{ messages }}", TEMPLATE
    cache = make_cache(tmp_path / "c", llama(IDS, seed=5), of_teacher, random_sequences(4, IDS, seed=1), num_shards=1)
    student = save(llama(IDS), tmp_path / "student", own)
    with caplog.at_level(logging.WARNING):
        train(settings(cache, tmp_path / "run", student=student, max_steps=1))
    assert "has another chat template than the teacher of the cache: it is saved with the teacher's" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == "{{ messages }}"


@loop(
    "found, expected",
    [(None, 1), (5, 1), ([5, 1], [5, 1]), ([5, 6], 1), (300, 1)],
)
def test_ids_that_end_a_text(found, expected):
    model = llama(IDS)
    model.config.eos_token_id, model.generation_config = found, GenerationConfig(eos_token_id=found, pad_token_id=300)
    align_special_ids(model, TOKENIZER, TASKS[CausalLM.name])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == expected
    assert model.generation_config.pad_token_id is None, "the tokenizer has none, and 300 was one of the rows"


@loop("longest, fits", [(63, True), (64, True), (65, False)])
def test_a_student_need_not_be_longer_than_the_longest_sequence(tmp_path, longest, fits):
    folder = tmp_path / str(longest)
    sequences = [random_sequences(1, IDS)[0], torch.randint(0, IDS, (longest + 1,)).numpy().astype("uint32")]
    long = llama(IDS, seed=5)
    cache = make_cache(folder / "c", long, TOKENIZER, sequences, num_shards=1, max_length=512)
    values = settings(cache, folder / "run", student=save(llama(IDS), folder / "s"), max_steps=1)
    if fits:
        train(values)
        assert evaluate_students(str(cache), [str(folder / "run")], device="cpu", progress=False).students[0].loss > 0
        return
    with pytest.raises(StudentError, match=r"at most 64 positions, but sequences of the cache have up to 65: choose"):
        train(values)
