from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from kdcache.errors import ConfigError, TeacherError
from kdcache.models.loading import load_tokenizer
from kdcache.schema import Sequence
from kdcache.teachers import HuggingFaceTeacher, TeacherConfig, load_teacher, parse_layers, reduce_top_k
from kdcache.teachers.huggingface import teacher_logits
from kdcache.teachers.logits import hidden_to_numpy
from tests.families import FAMILIES, SPLITTABLE
from tests.loops import loop
from tests.synthetic import targets_of
from tests.tiny import llama

VOCAB_SIZE, HEAD_ROWS = 50, 64
families = loop("family", FAMILIES)


def sequence(tokens: np.ndarray, segments: np.ndarray | None = None, index: int = 0) -> Sequence:
    return Sequence(index, tokens.astype(np.uint32), np.ones(len(tokens) - 1, np.uint8), segments)


def random_tokens(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB_SIZE, n) for n in lengths]


def dense(model, tokens: np.ndarray):
    """One sequence, no padding, whole logits, every hidden state: what all else must equal."""
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(tokens[None, :-1].astype(np.int64)), output_hidden_states=True)
    return output.logits[0], [states[0] for states in output.hidden_states]


@families
def test_targets_equal_the_dense_softmax_over_the_true_vocabulary(family):
    teacher = HuggingFaceTeacher(FAMILIES[family](HEAD_ROWS), family, VOCAB_SIZE)
    tokens = random_tokens(9, 3, 17, 2)
    output = teacher.run([sequence(t) for t in tokens])
    targets = reduce_top_k(output.logits, output.labels_P, 5)
    labels = np.concatenate([t[1:] for t in tokens])
    np.testing.assert_array_equal(output.labels_P, labels)
    logits = torch.cat([dense(teacher.model, t)[0] for t in tokens])[:, :VOCAB_SIZE]
    expected = targets_of(logits.numpy(), labels, 5)
    np.testing.assert_array_equal(targets.ids_PK, expected.ids_PK)
    for name in ("logprobs_PK", "log_tail_P", "gold_logprob_P", "entropy_P"):
        np.testing.assert_allclose(getattr(targets, name), getattr(expected, name), atol=3e-5, err_msg=name)
    assert teacher.record.vocab_size == HEAD_ROWS


@families
@loop("layers", [[2], [0], [1], [0, 1, 2]], ids=str)
def test_hidden_states_equal_the_models_own(family, layers):
    teacher = HuggingFaceTeacher(FAMILIES[family](HEAD_ROWS), family, VOCAB_SIZE)
    tokens = random_tokens(9, 3, 17)
    output = teacher.run([sequence(t) for t in tokens], layers)
    assert set(output.hidden) == set(layers)
    states = [dense(teacher.model, t)[1] for t in tokens]
    for layer in layers:
        expected = torch.cat([item[layer] for item in states]).numpy()
        np.testing.assert_allclose(hidden_to_numpy(output.hidden[layer]), expected, atol=3e-5)


@families
def test_documents_of_a_window_get_what_they_get_alone(family):
    teacher = HuggingFaceTeacher(FAMILIES[family](HEAD_ROWS), family, VOCAB_SIZE)
    teacher.check_packing()
    documents = random_tokens(7, 2, 1, 9)
    other = random_tokens(4, 5, seed=1)  # a shorter window beside it, so that there is padding
    segments = [
        np.repeat(np.arange(len(docs)), [len(d) for d in docs]).astype(np.uint16) for docs in (documents, other)
    ]
    windows = [np.concatenate(docs) for docs in (documents, other)]
    output = teacher.run([sequence(w, s) for w, s in zip(windows, segments, strict=True)])
    logits = output.logits(0, len(output.labels_P)).clone()
    start = 0
    for document in documents:
        if len(document) > 1:
            alone = dense(teacher.model, document)[0][:, :VOCAB_SIZE]
            torch.testing.assert_close(logits[start : start + len(document) - 1], alone, rtol=0, atol=3e-5)
        start += len(document)
    start -= 1
    for document in other:
        alone = dense(teacher.model, document)[0][:, :VOCAB_SIZE]
        torch.testing.assert_close(logits[start : start + len(document) - 1], alone, rtol=0, atol=3e-5)
        start += len(document)


def test_a_family_that_reads_across_documents_is_refused():
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    teacher = HuggingFaceTeacher(transformers.BloomForCausalLM(config), "tiny-bloom", 50)
    with pytest.raises(TeacherError, match=r"tiny-bloom \(BloomForCausalLM\) reads across .*attend_across_documents"):
        teacher.check_packing()


@pytest.mark.parametrize("family", SPLITTABLE)
def test_known_families_are_split(family, caplog):
    HuggingFaceTeacher(SPLITTABLE[family](HEAD_ROWS), family, VOCAB_SIZE)
    assert not caplog.records


def test_a_head_that_cannot_be_split_is_said(caplog):
    HuggingFaceTeacher(FAMILIES["unsplittable"](HEAD_ROWS), "odd", VOCAB_SIZE)
    assert "the LM head of odd cannot be split off" in caplog.text


def test_answers_outlive_the_next_question():
    teacher = HuggingFaceTeacher(llama(HEAD_ROWS), "llama", VOCAB_SIZE)
    first, second = (sequence(t) for t in random_tokens(9, 9))
    kept = teacher_logits(teacher, first)
    before = kept.clone()
    assert not torch.equal(teacher_logits(teacher, second), before)
    assert torch.equal(kept, before)


def encoder(tmp_path, **settings):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=16, initializer_range=0.3, **settings)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    return TeacherConfig(model=str(tmp_path), device="cpu")


def test_an_encoder_that_loads_as_a_causal_model_is_refused(tmp_path):
    with pytest.raises(TeacherError, match=r"not a causal language model: its prediction depends on tokens that come"):
        load_teacher(encoder(tmp_path), 50)


def test_the_same_model_as_a_decoder_is_accepted(tmp_path):
    assert load_teacher(encoder(tmp_path, is_decoder=True), 50).record.architecture == "BertLMHeadModel"


@families
def test_a_model_that_looks_ahead_is_refused_whatever_its_head(family):
    model = FAMILIES[family](HEAD_ROWS)
    body = model.base_model
    real = body.forward

    def look_ahead(*args, **kwargs):
        output = real(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.flip(1)
        return output

    body.forward = look_ahead
    with pytest.raises(TeacherError, match="not a causal language model"):
        HuggingFaceTeacher(model, family, VOCAB_SIZE)


def test_a_tokenizer_with_more_ids_than_the_model(teacher_dir):
    size = len(load_tokenizer(str(teacher_dir))) + 22
    teacher = load_teacher(TeacherConfig(model=str(teacher_dir), device="cpu"), 9999)
    assert (teacher.vocab_size, teacher.capabilities.num_ids) == (size, size)
    assert teacher_logits(teacher, sequence(random_tokens(4)[0])).shape[1] == size


def test_the_record_describes_the_teacher(teacher_dir):
    size = len(load_tokenizer(str(teacher_dir)))
    record = load_teacher(TeacherConfig(model=str(teacher_dir), device="cpu"), size).record
    assert record.name == str(teacher_dir)
    assert record.architecture == "LlamaForCausalLM"
    assert (record.num_layers, record.hidden_size, record.dtype) == (2, 16, "float32")
    assert record.vocab_size == size + 22
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_dir)
    assert record.num_parameters == model.num_parameters()


@pytest.mark.parametrize(("dtype", "found"), [("auto", "float32"), ("bf16", "bfloat16"), ("float16", "float16")])
def test_dtypes(teacher_dir, dtype, found):
    teacher = load_teacher(TeacherConfig(model=str(teacher_dir), dtype=dtype, device="cpu"), 50)
    assert teacher.record.dtype == found


@loop(
    ("names", "numbers"),
    [
        (["last"], [4]),
        (["last", 4, "-1"], [4]),
        ([0, -5], [0]),
        (["3", 1, -2], [1, 3]),
        ([" 2 "], [2]),
        ([], []),
    ],
    ids=str,
)
def test_layers(names, numbers):
    assert parse_layers(names, 4) == numbers


@loop("name", [5, -6, "99"])
def test_layers_that_are_not_there(name):
    with pytest.raises(ConfigError, match=rf"no hidden state {name}; it has 0 \(embeddings\) to 4 \(last\)"):
        parse_layers([name], 4)


@loop("name", ["first", "1.5", ""])
def test_layers_that_are_no_layers(name):
    with pytest.raises(ConfigError, match=f"by layer number or 'last', found '{name}'"):
        parse_layers([name], 4)
