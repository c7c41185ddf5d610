from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.corpus import CorpusConfig, load_corpus
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import ConfigError, CorpusError, TeacherError
from kdcache.losses import ForwardKL, TeacherRows, score_positions
from kdcache.losses.from_cache import context_of
from kdcache.models.bodies import split_for
from kdcache.models.lm_head import LMHead
from kdcache.models.tokenizer import TextEncoder
from kdcache.schema import NO_LABEL, OUTPUTS_FIELD, OutputsRecord
from kdcache.students import StudentConfig, load_student
from kdcache.tasks import TaskSettings, task_of
from kdcache.tasks.labels import class_label, number_label
from kdcache.teachers import TeacherConfig
from kdcache.teachers.transformers_backend import outputs_record
from kdcache.torch_data import to_tensors
from tests.loops import loop
from tests.task_models import SENTENCES, TINY_TASKS, bert, bert_tokenizer

TASK = task_of("sequence-classification")
NAMES = ("bad", "fair", "good")
CLASSES = OutputsRecord(width=3, labels=NAMES)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plan(path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, task: Any = TASK, **settings: Any) -> Any:
    columns = settings.pop("columns", {})
    corpus = load_corpus(CorpusConfig(paths=(write(path / "c.jsonl", rows),), columns=columns), task.roles)
    outputs = CLASSES if task is TASK else OutputsRecord(width=1)
    return task.plan(corpus, TextEncoder(tokenizer or bert_tokenizer()), build(TaskSettings, settings), outputs)


def all_of(sequences: Any) -> list[Any]:
    return [sequences.sequence(n) for n in range(sequences.num_sequences)]


def labels_of(sequences: Any) -> list[float]:
    return np.concatenate([sequence.labels_L for sequence in all_of(sequences)]).tolist()


# Labels.


@loop(
    ("value", "expected"),
    [("good", 2), (1, 1), (1.0, 1), ("0", 0), (None, NO_LABEL), (math.nan, NO_LABEL), (-1, NO_LABEL), ("-1", NO_LABEL)],
)
def test_a_class_by_name_or_number_or_none(value, expected):
    assert class_label(value, NAMES, "c.jsonl:4") == expected


@loop(
    ("value", "message"),
    [
        ("goood", "no class 'goood', did you mean 'good'"),
        (3, "no class 3, it has 0 to 2"),
        (-2, "no class -2"),
        (1.5, r"no class 1\.5"),
        (math.inf, "no class inf"),
        (True, "no class True, it has 0 to 2"),
        ("--1", "no class '--1'"),
        ("", "no class ''"),
        ([1, 0, 0], r"no class \[1, 0, 0\]"),
    ],
)
def test_a_class_that_there_is_not_says_where(value, message):
    with pytest.raises(CorpusError, match=rf"^c\.jsonl:4: the teacher has {message}"):
        class_label(value, NAMES, "c.jsonl:4")


def test_a_number_that_may_be_two_classes_is_not_guessed():
    stars = ("1", "2", "3")
    assert [class_label(name, stars, "d") for name in stars] == [0, 1, 2]
    assert class_label(0, stars, "d") == 0, "no class is called so"
    ambiguous = "label 1 is ambiguous: it is the name of one class, and the number of class '2'"
    with pytest.raises(CorpusError, match=ambiguous):
        class_label(1, stars, "d")
    assert [class_label(n, ("0", "1"), "d") for n in (0, 1)] == [0, 1]


@loop(("value", "expected"), [(2, 2.0), ("2.5", 2.5), (True, 1.0), (None, None), (math.nan, None)])
def test_a_number_as_label(value, expected):
    found = number_label(value, "d")
    assert math.isnan(found) if expected is None else found == expected


@loop("value", ["high", "", [1.0], math.inf, -math.inf, "1e99", 10**400])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(CorpusError, match=r"^c\.jsonl:7: expected a number as label, found"):
        number_label(value, "c.jsonl:7")


def test_labels_of_a_corpus(tmp_path):
    rows = [{"text": "the cat", "label": label} for label in ("good", None, "0", "fair")]
    assert labels_of(plan(tmp_path, rows)) == [2, NO_LABEL, 0, 1]
    rows[2]["label"] = "god"
    with pytest.raises(CorpusError, match=r"c\.jsonl:2: the teacher has no class 'god', did you mean 'good'"):
        plan(tmp_path, rows)


def test_labels_of_different_types_in_different_files(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "the cat", "label": "good"}])
    write(tmp_path / "b.jsonl", [{"text": "the dog", "label": 1}, {"text": "the dog", "label": None}])
    write(tmp_path / "c.jsonl", [{"text": "the sun"}])
    corpus = load_corpus(CorpusConfig(paths=(str(tmp_path),)), TASK.roles)
    sequences = TASK.plan(corpus, TextEncoder(bert_tokenizer()), TaskSettings(), CLASSES)
    assert labels_of(sequences) == [2, 1, NO_LABEL, NO_LABEL]


def test_columns_of_other_names(tmp_path):
    rows = [{"sentence": "the cat", "sentiment": "good"}, {"sentence": "the dog", "sentiment": "bad"}]
    assert labels_of(plan(tmp_path, rows, columns={"text": "sentence", "label": "sentiment"})) == [2, 0]
    assert labels_of(plan(tmp_path, rows, columns={"text": "sentence"})) == [NO_LABEL, NO_LABEL]
    with pytest.raises(CorpusError, match=r"no column 'rating' for the label .* its columns are sentence, sentiment"):
        plan(tmp_path, rows, columns={"text": "sentence", "label": "rating"})
    with pytest.raises(CorpusError, match="reads no 'labels'; did you mean 'label'"):
        plan(tmp_path, rows, columns={"text": "sentence", "labels": "sentiment"})
    with pytest.raises(CorpusError, match="text"):
        plan(tmp_path, rows)


def test_scores_of_a_corpus(tmp_path):
    task = task_of("sequence-regression")
    rows = [{"text": "the cat", "label": value} for value in (1.5, None, 4)]
    found = labels_of(plan(tmp_path, rows, task=task))
    assert found[0] == 1.5
    assert math.isnan(found[1])
    assert found[2] == 4.0


# Texts and pairs.


def roberta_tokenizer() -> Any:
    """BERT's words with RoBERTa's way to join two texts, two tokens between them and all of one type."""
    tokenizer = bert_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def bare_tokenizer() -> Any:
    """No special tokens around texts, as GPT-2's."""
    tokenizer = bert_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    return tokenizer


@pytest.mark.parametrize("make", [bert_tokenizer, roberta_tokenizer, bare_tokenizer])
@pytest.mark.parametrize("max_length", [64, 8])
def test_sequences_are_what_the_tokenizer_makes(make, max_length, tmp_path):
    pairs = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[7], "the dog"), ("a cat", SENTENCES[7]), ("the cat", None)]
    sequences = plan(tmp_path, [{"text": a, "text_pair": b} for a, b in pairs], make(), max_length=max_length)
    for sequence, (first, second) in zip(all_of(sequences), pairs, strict=True):
        backend = make().backend_tokenizer
        backend.enable_truncation(max_length, strategy="longest_first")
        expected = backend.encode(first, second)
        assert sequence.tokens_T.tolist() == expected.ids
        if make is bert_tokenizer:
            assert np.asarray(sequence.segment_ids_T).tolist() == expected.type_ids
    num_cut = sum(len(make()(*[text for text in pair if text])["input_ids"]) > max_length for pair in pairs)
    assert sequences.num_truncated == num_cut


def test_a_pair_with_an_empty_second_text_is_a_text(tmp_path):
    rows = [{"text": "the cat", "text_pair": second} for second in ("", None, "  ", "a dog")]
    tokens = [sequence.tokens_T.tolist() for sequence in all_of(plan(tmp_path, rows))]
    alone = bert_tokenizer()("the cat")["input_ids"]
    assert tokens[:3] == [alone] * 3
    assert tokens[3] == bert_tokenizer()("the cat", "a dog")["input_ids"]


def test_empty_texts_are_counted_and_left_out(tmp_path):
    rows = [{"text": "", "label": "bad"}, {"text": "the cat", "label": "good"}, {"text": None}, {"text": " "}]
    sequences = plan(tmp_path, rows)
    assert labels_of(sequences) == [2]
    assert (sequences.num_empty, sequences.num_too_short) == (2, 1)


def test_a_length_without_room_is_refused(tmp_path):
    rows = [{"text": "the cat", "text_pair": "a dog"}]
    with pytest.raises(ConfigError, match="--max-length 5 leaves no room for 2 texts in addition to 4 special tokens"):
        plan(tmp_path, rows, roberta_tokenizer(), max_length=5)
    assert len(plan(tmp_path, rows, roberta_tokenizer(), max_length=6).sequence(0).tokens_T) == 6


# Models.


def decoder(kind: str, pad_id: int | None) -> Any:
    torch.manual_seed(3)
    common = {"vocab_size": 31, "num_labels": 3, "pad_token_id": pad_id, "initializer_range": 0.5}
    common |= {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **common
        )
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


@loop("pad_id", [None, 0, 30])
@loop("kind", ["gpt2", "llama"])
def test_a_decoder_answers_the_same_in_a_batch_as_alone(kind, pad_id):
    model = decoder(kind, pad_id)
    body = split_for(TASK.body, model, CLASSES).body
    # One ends with each small id, so an id of padding has to be sought; the last is full of ids that may be padding.
    texts = [[5, 6, 1], [7, 8, 9, 2], [4, 3], [9], [1, 2, 3, 4, 5, 6, 7, 10], [1, 0, 2, 30, 29]]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [11] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        together = body(input_ids=ids, attention_mask=mask, token_type_ids=mask, output_hidden_states=True)
        for n, text in enumerate(texts):
            alone = model(input_ids=torch.tensor([text]), output_hidden_states=True)
            torch.testing.assert_close(together.last_hidden_state[n, 0], alone.logits[0], rtol=1e-4, atol=1e-5)
            for mine, theirs in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(mine[n, 0], theirs[0, -1], rtol=1e-4, atol=1e-5)
    assert model.config.pad_token_id == pad_id, "it is lent, not given"


def decoder_cache(tmp_path: Path) -> tuple[str, str]:
    """A cache of a GPT-2 without an id of padding, and the teacher."""
    teacher = str(tmp_path / "teacher")
    decoder("gpt2", None).save_pretrained(teacher)
    bare_tokenizer().save_pretrained(teacher)
    corpus = write(tmp_path / "c.jsonl", [{"text": text, "label": n % 3} for n, text in enumerate(SENTENCES)])
    settings = {
        "output": str(tmp_path / "cache"),
        "task": TASK.name,
        "teacher": {"model": teacher, "device": "cpu"},
        "corpus": {"paths": [corpus]},
        "sequences": {"max_length": 32},
        "outputs": {"codec": "exact"},
    }
    dump_teacher(build(DumpConfig, settings), progress=False)
    return str(tmp_path / "cache"), teacher


def test_a_decoder_as_teacher_and_as_student(tmp_path):
    path, teacher = decoder_cache(tmp_path)
    cache, model = open_cache(path), decoder("gpt2", None)
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor(bare_tokenizer()([text])["input_ids"])).logits[0].numpy() for text in SENTENCES
        ]
    stored = cache.read(range(len(SENTENCES)), fields=(OUTPUTS_FIELD,))
    np.testing.assert_allclose(stored.hidden[OUTPUTS_FIELD], expected, rtol=1e-4, atol=1e-5)
    student = load_student(StudentConfig(model=teacher), cache.manifest, cache.tokenizer_dir())
    student.model.eval()
    with torch.no_grad():
        answers = student.hidden(to_tensors(stored, student.pad_id, TASK)).numpy()
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_independent_classes_is_refused(tmp_path):
    config = bert("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification").config
    config.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="gives every class a probability of its own"):
        outputs_record(TeacherConfig(model=str(tmp_path)), TASK, TaskSettings(), TextEncoder(bert_tokenizer()))


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classes")
    found = TINY_TASKS[TASK.name].write(path)
    settings = {
        "output": str(path / "cache"),
        "task": TASK.name,
        "teacher": {"model": found["teacher"], "device": "cpu"},
        "corpus": {"paths": [found["corpus"]]},
        "outputs": {"codec": "exact"},
    }
    dump_teacher(build(DumpConfig, settings), progress=False)
    return str(path / "cache")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_every_temperature_is_exact(cache_path, temperature):
    cache = open_cache(cache_path)
    batch = cache.read(range(len(cache)), fields=(OUTPUTS_FIELD,))
    teacher_PC = torch.from_numpy(batch.hidden[OUTPUTS_FIELD]).double()
    student_PC = torch.randn(teacher_PC.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    rows = TeacherRows.from_batch(to_tensors(batch, 0, TASK))
    loss = ForwardKL(weight=1.0, temperature=temperature)
    head = LMHead(torch.eye(3, dtype=torch.float64))
    values_P = score_positions(student_PC, head, rows, {"kl": loss}, context=context_of(cache)).losses["kl"]
    log_t, log_s = ((logits / temperature).log_softmax(-1) for logits in (teacher_PC, student_PC))
    expected_P = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)
    assert expected_P.min() > 0.01
    # The cache holds log-probabilities and logits in float32.
    torch.testing.assert_close(values_P.double(), expected_P, rtol=2e-5, atol=2e-6)
