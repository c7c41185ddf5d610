"""What families of models and tokenizers do differently from BERT: a dump says what the model says, or refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.corpus import CorpusConfig, load_corpus
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import ConfigError, CorpusError, TeacherError
from kdcache.evaluate import evaluate_students
from kdcache.models.generation import write_texts
from kdcache.models.tokenizer import TextEncoder
from kdcache.schema import OUTPUTS_FIELD
from kdcache.students import StudentConfig, load_student
from kdcache.tasks import task_of
from kdcache.tasks.documents import BuiltSequence
from kdcache.tasks.seq2seq_lm import Seq2SeqSettings
from kdcache.torch_data import to_tensors
from tests.task_models import SENTENCES, WORDS, bert, bert_tokenizer
from tests.tasks.test_sequence_classification import roberta_tokenizer

NAMES = ("contradiction", "neutral", "entailment")
CLASSES = {"id2label": dict(enumerate(NAMES)), "label2id": {name: n for n, name in enumerate(NAMES)}}
PAIRS = [{"text": text, "text_pair": SENTENCES[n - 1]} for n, text in enumerate(SENTENCES)]
SINGLES = [{"text": text} for text in SENTENCES]
BART_SIZES = {
    "vocab_size": len(bert_tokenizer()),
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 3,
}


def bart() -> Any:
    torch.manual_seed(1)
    return transformers.BartForSequenceClassification(transformers.BartConfig(**BART_SIZES, num_labels=3, **CLASSES))


def xlnet() -> Any:
    torch.manual_seed(1)
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "pad_token_id": 0, "initializer_range": 0.3}
    config = transformers.XLNetConfig(vocab_size=len(bert_tokenizer()), **sizes, num_labels=3, **CLASSES)
    return transformers.XLNetForSequenceClassification(config)


def dump(path: Path, model: Any, rows: list[dict[str, Any]], tokenizer: Any = None, task: str = "", **more: Any) -> str:
    model.eval().save_pretrained(path / "teacher")
    (tokenizer or bert_tokenizer()).save_pretrained(path / "teacher")
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "output": str(path / "cache"),
        "task": task or "sequence-classification",
        "teacher": {"model": str(path / "teacher"), "device": "cpu"},
        "corpus": {"paths": [str(path / "corpus.jsonl")]},
        "sequences": {"max_length": 48},
        "batch_tokens": 400,
        **more,
    }
    dump_teacher(build(DumpConfig, settings), progress=False)
    return str(path / "cache")


def own_answers(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[Any]:
    """What the model says of each row alone, fed by its own tokenizer."""
    takes = inspect.signature(model.forward).parameters
    answers = []
    for row in rows:
        fed = tokenizer(*row.values(), return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            answers.append(model(**{name: value for name, value in fed.items() if name in takes}).logits[0].numpy())
    return answers


@pytest.mark.parametrize(
    ("make", "tokenizer", "rows"),
    [
        (lambda: bert("BertForSequenceClassification", num_labels=3, **CLASSES), bert_tokenizer, PAIRS),
        (lambda: bert("BertForSequenceClassification", num_labels=3, **CLASSES), roberta_tokenizer, PAIRS),
        (bart, bert_tokenizer, SINGLES),
        (bart, bert_tokenizer, [*SINGLES[:3], *PAIRS[3:6], *SINGLES[6:]]),
    ],
    ids=["typed", "untyped", "bart", "bart mixed"],
)
def test_teacher_and_student_say_what_the_model_says(make, tokenizer, rows, tmp_path):
    path = dump(tmp_path, make(), rows, tokenizer(), outputs={"codec": "exact"})
    expected = own_answers(make().eval(), tokenizer(), rows)
    cache = open_cache(path)
    stored = cache.read(range(len(rows)), fields=(OUTPUTS_FIELD,))
    np.testing.assert_allclose(stored.hidden[OUTPUTS_FIELD], expected, rtol=1e-4, atol=1e-5)
    student = load_student(StudentConfig(model=str(tmp_path / "teacher")), cache.manifest, cache.tokenizer_dir())
    student.model.eval()
    with torch.no_grad():
        answers = student.hidden(to_tensors(stored, student.pad_id, task_of("sequence-classification"))).numpy()
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_that_reads_padding_says_of_texts_of_all_lengths_what_it_says_of_each_alone(tmp_path, caplog):
    path = dump(tmp_path, xlnet(), SINGLES, outputs={"codec": "exact"})
    assert caplog.text.count("answers a text differently beside longer ones") == 1
    expected = own_answers(xlnet().eval(), bert_tokenizer(), SINGLES)
    cache = open_cache(path)
    stored = cache.read(range(len(SINGLES)), fields=(OUTPUTS_FIELD,))
    np.testing.assert_allclose(stored.hidden[OUTPUTS_FIELD], expected, rtol=1e-4, atol=1e-5)
    student = load_student(StudentConfig(model=str(tmp_path / "teacher")), cache.manifest, cache.tokenizer_dir())
    student.model.eval()
    with torch.no_grad():
        answers = student.hidden(to_tensors(stored, student.pad_id, task_of("sequence-classification"))).numpy()
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-5)


def test_states_that_a_classifier_does_not_return(tmp_path):
    with pytest.raises(TeacherError, match=r"Bart.* does not return the states of its layers"):
        dump(tmp_path, bart(), SINGLES, hidden_states={"layers": [1]})


def test_a_masked_model_whose_last_matrix_is_made_of_two_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}
    config = transformers.MobileBertConfig(
        vocab_size=len(bert_tokenizer()), num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **sizes
    )
    with pytest.raises(TeacherError, match="cannot be split into a body and a head"):
        dump(tmp_path, transformers.MobileBertForMaskedLM(config), SINGLES, task="masked-lm", targets={"top_k": 5})


@pytest.mark.parametrize("languages", [{}, {"src_lang": "en_XX"}, {"src_lang": "en_XX", "tgt_lang": "ro_RO"}])
def test_a_tokenizer_that_encodes_targets_differently_is_refused(languages, tmp_path):
    pieces = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [(f"\u2581{word}", -2.0) for word in WORDS.split()] + [("\u2581", -9.0)]
    tokenizer = transformers.MBartTokenizer(vocab=pieces, **languages)
    (tmp_path / "c.jsonl").write_text(json.dumps({"input": "the cat", "target": "a dog"}))
    task = task_of("seq2seq-lm")
    corpus = load_corpus(CorpusConfig(paths=(str(tmp_path / "c.jsonl"),)), task.roles)
    with pytest.raises(ConfigError, match="encodes targets differently from inputs"):
        task.plan(corpus, TextEncoder(tokenizer), Seq2SeqSettings(), None)


def test_a_text_that_ends_by_force_is_cut():
    torch.manual_seed(5)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART_SIZES)).eval()
    tokenizer = bert_tokenizer(eos_token="[SEP]", bos_token="[CLS]")
    inputs = [np.array(tokenizer(text)["input_ids"], np.uint32) for text in SENTENCES]
    free, forced = [], []
    for found, eos_id in ((free, None), (forced, 3)):
        model.generation_config.forced_eos_token_id = eos_id
        found += write_texts(model, tokenizer, len(tokenizer), inputs, max_tokens=8)
    assert any(text.is_cut for text in free)
    assert forced == free


# Names of classes.


def classes_corpus(path: Path, names: list[str], labels: list[int]) -> str:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict({"text": SENTENCES, "label": labels}, features=features)
    data.to_parquet(str(path / "corpus.parquet"))
    return str(path / "corpus.parquet")


@pytest.mark.parametrize("names", [["Entailment", "neutral", "CONTRADICTION"], ["0", "1", "2"], list(NAMES)])
def test_classes_of_a_corpus_are_the_teachers_by_name(names, tmp_path):
    model = bert("BertForSequenceClassification", num_labels=3, seed=1, **CLASSES).eval()
    own = [int(answer.argmax()) for answer in own_answers(model, bert_tokenizer(), SINGLES)]
    assert len(set(own)) > 1
    lower = [name.lower() for name in names]
    numbers = [lower.index(NAMES[n]) if "neutral" in names else n for n in own]
    corpus = classes_corpus(tmp_path, names, numbers)
    path = dump(tmp_path, model, SINGLES, corpus={"paths": [corpus]})
    assert evaluate_students(path, [], progress=False).teacher.top1_accuracy == 1


def test_classes_that_are_called_like_others_of_the_teacher_are_refused(tmp_path):
    model = bert("BertForSequenceClassification", num_labels=3, **CLASSES)
    corpus = classes_corpus(tmp_path, ["entailment", "neutral", "unrelated"], [0, 1, 2, 0, 1, 2, 0, 1])
    with pytest.raises(CorpusError, match="entailment, neutral, unrelated and the teacher contradiction, neutral"):
        dump(tmp_path, model, SINGLES, corpus={"paths": [corpus]})


def test_unlabelled_rows_of_named_classes(tmp_path):
    model = bert("BertForSequenceClassification", num_labels=3, **CLASSES)
    corpus = classes_corpus(tmp_path, ["entailment", "neutral", "contradiction"], [-1, 0, 1, 2, None, -1, 0, 0])
    cache = open_cache(dump(tmp_path, model, SINGLES, corpus={"paths": [corpus]}))
    batch = to_tensors(cache.read(range(8)), 0, task_of("sequence-classification"))
    assert batch["labels"].tolist() == [-1, 2, 1, 0, -1, -1, 2, 2]


def test_a_task_that_gives_places_and_labels_of_different_numbers_is_told():
    with pytest.raises(ValueError, match="as many labels as token indices, found 2 and 3"):
        BuiltSequence(np.arange(5, dtype=np.uint32), None, np.zeros(2), np.arange(3, dtype=np.uint32))


# Heads of masked models.

ESM = {"mask_token_id": 4, "pad_token_id": 0, "position_embedding_type": "rotary", "token_dropout": False}
SIZES = {
    "vocab_size": len(bert_tokenizer()),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
ONE_GROUP = {"q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups"}


def other(family: str, head: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**SIZES | settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: other("Esm", "ForMaskedLM", **ESM),
        lambda: other("IBert", "ForMaskedLM"),
        lambda: other("SqueezeBert", "ForMaskedLM", embedding_size=16, **dict.fromkeys(ONE_GROUP, 1)),
        lambda: other("Roberta", "ForMaskedLM", pad_token_id=0, tie_word_embeddings=False),
    ],
    ids=["esm", "ibert", "squeezebert", "roberta untied"],
)
def test_masked_models_with_heads_of_their_own_kind(make, tmp_path):
    targets = {"top_k": 5, "codec": {"name": "exact"}}
    path = dump(tmp_path, make(), SINGLES, task="masked-lm", targets=targets, batch_tokens=64)
    cache, model = open_cache(path), transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "teacher").eval()
    for index in range(len(cache)):
        stored = cache.read([index])
        tokens = torch.from_numpy(stored.tokens_T.astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].double()
        expected = logits.log_softmax(1).topk(5).values[stored.token_index_P.astype(np.int64)]
        np.testing.assert_allclose(stored.targets.logprobs_PK, expected, rtol=0, atol=3e-5)


def test_a_bias_outside_the_last_matrix_learns(tmp_path):
    path = dump(tmp_path, other("Esm", "ForMaskedLM", **ESM), SINGLES, task="masked-lm", targets={"top_k": 5})
    cache = open_cache(path)
    student = load_student(StudentConfig(model=str(tmp_path / "teacher")), cache.manifest, cache.tokenizer_dir())
    batch = to_tensors(cache.read(range(4)), student.pad_id, task_of("masked-lm"))
    student.head.logits(student.hidden(batch)).log_softmax(1)[:, 0].sum().backward()
    found = student.model.lm_head.bias.grad.clone()
    student.model.zero_grad()
    fed = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = student.model(**fed).logits.flatten(0, 1)[batch["rows"]]
    own.log_softmax(1)[:, 0].sum().backward()
    torch.testing.assert_close(found, student.model.lm_head.bias.grad)


def test_a_model_whose_code_cannot_do_without_its_pooler_embeds(tmp_path):
    settings = dict.fromkeys(ONE_GROUP, 1)
    model = other("SqueezeBert", "Model", embedding_size=16, **settings)
    cache = open_cache(dump(tmp_path, model, SINGLES, task="embedding", outputs={"codec": "exact"}))
    stored = cache.read(range(len(SINGLES)), fields=(OUTPUTS_FIELD,)).hidden[OUTPUTS_FIELD]
    for row, text in enumerate(SENTENCES):
        with torch.no_grad():
            states = model(**bert_tokenizer()(text, return_tensors="pt")).last_hidden_state
        expected = torch.nn.functional.normalize(states.mean(1), dim=1)[0]
        np.testing.assert_allclose(stored[row], expected, rtol=0, atol=1e-5)
    student = load_student(StudentConfig(model=str(tmp_path / "teacher")), cache.manifest, cache.tokenizer_dir())
    pooler = list(student.model.pooler.parameters())
    assert pooler
    assert not any(parameter.requires_grad for parameter in pooler)


def perceiver() -> Any:
    sizes = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1}
    config = transformers.PerceiverConfig(vocab_size=len(bert_tokenizer()), **sizes, max_position_embeddings=64)
    return transformers.PerceiverForMaskedLM(config)


def fsmt() -> Any:
    sizes = {**BART_SIZES, "src_vocab_size": 31, "tgt_vocab_size": 31, "langs": ["a", "b"], "num_hidden_layers": 2}
    return transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**sizes))


@pytest.mark.parametrize(
    ("make", "task", "words"),
    [
        (perceiver, "masked-lm", r"teacher cannot be split into a body and a head"),
        (fsmt, "seq2seq-lm", r"teacher cannot be split into a body and a head"),
        (
            lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART_SIZES)),
            "masked-lm",
            r"teacher is an encoder-decoder \(bart\).*use --task seq2seq-lm",
        ),
        (
            lambda: transformers.PerceiverModel(perceiver().config),
            "embedding",
            r"configuration of .*teacher \(perceiver\) names no hidden_size",
        ),
        (
            lambda: transformers.CanineForSequenceClassification(
                transformers.CanineConfig(
                    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3
                )
            ),
            "sequence-classification",
            r"teacher \(CanineForSequenceClassification\) cannot be run for task sequence-classification: NotImpl",
        ),
    ],
    ids=["perceiver", "fsmt", "bart", "perceiver embedding", "canine"],
)
def test_architectures_that_do_not_work_are_refused_in_one_message(make, task, words, tmp_path):
    torch.manual_seed(0)
    rows = [{"input": text, "target": text} for text in SENTENCES] if task == "seq2seq-lm" else SINGLES
    more = {} if task in ("embedding", "sequence-classification") else {"targets": {"top_k": 5}}
    with pytest.raises(TeacherError, match=words):
        dump(tmp_path, make(), rows, task=task, **more)
    assert not (tmp_path / "cache").exists()
