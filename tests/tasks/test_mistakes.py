"""What users get wrong about teachers, corpora and students of the tasks, and what they are told."""

import json

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from kdcache.config import build
from kdcache.corpus import TEXT, Role, load_corpus
from kdcache.corpus.documents import CorpusConfig
from kdcache.dump import dump_teacher
from kdcache.errors import ConfigError, CorpusError, StudentError, TeacherError
from kdcache.losses import TeacherContext
from kdcache.losses.outputs import LabelMSE
from kdcache.students.layers import with_layers
from kdcache.train import TrainConfig, train_student
from tests.task_models import TINY_TASKS, bert, bert_tokenizer, dump_config, t5, t5_tokenizer


def saved(path, model, tokenizer):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_column_of_mixed_types_is_read_as_it_is_written(tmp_path):
    rows = [
        {"text": "a", "text_pair": 'b "c"', "label": "bad", "documents": ["x", "y"]},
        {"text": "d", "text_pair": None, "label": 0, "documents": ["z", 1]},
        {"text": "e", "text_pair": 5, "label": 1.5, "documents": None},
    ]
    roles = (TEXT, *(Role(name, False) for name in ("text_pair", "label", "documents")))
    corpus = load_corpus(CorpusConfig(paths=(written(tmp_path / "a.jsonl", rows),)), roles)
    [(_, found)] = corpus.iter_rows(10)
    assert [{"text": text} | more for text, more in found] == rows


def test_files_that_differ_in_the_type_of_a_column_keep_their_values(tmp_path):
    paths = tuple(written(tmp_path / f"{n}.jsonl", [{"text": "a", "label": n}]) for n in ("bad", 1))
    corpus = load_corpus(CorpusConfig(paths=paths), (TEXT, Role("label", False)))
    assert [more["label"] for _, rows in corpus.iter_rows(10) for _, more in rows] == ["bad", 1]


@pytest.mark.parametrize("task", ["sequence-classification", "embedding"])
def test_a_second_text_that_is_none_is_told(tmp_path, task):
    found = TINY_TASKS[task].write(tmp_path)
    found["corpus"] = written(tmp_path / "corpus.jsonl", [{"text": "the cat", "text_pair": 5}])
    with pytest.raises(CorpusError, match="expected texts, found int '5'"):
        dump_teacher(dump_config(task, found, tmp_path / "cache"), progress=False)


def test_class_numbers_with_a_gap_are_told(tmp_path):
    found = TINY_TASKS["sequence-classification"].write(tmp_path)
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "bad", "1": "fair", "3": "good"}}))
    with pytest.raises(TeacherError, match="numbers its 3 classes 0, 1, 3, expected 0 to 2"):
        dump_teacher(dump_config("sequence-classification", found, tmp_path / "cache"), progress=False)


def test_an_encoder_decoder_embeds_nothing(tmp_path):
    found = TINY_TASKS["embedding"].write(tmp_path)
    found["teacher"] = saved(tmp_path / "t5", t5(), t5_tokenizer())
    with pytest.raises(TeacherError, match="is an encoder-decoder"):
        dump_teacher(dump_config("embedding", found, tmp_path / "cache"), progress=False)
    found = TINY_TASKS["embedding"].write(tmp_path)
    dump_teacher(dump_config("embedding", found, tmp_path / "cache"), progress=False)
    settings = {"cache": str(tmp_path / "cache"), "output": str(tmp_path / "run")}
    student = {"model": saved(tmp_path / "t5", t5(), bert_tokenizer())}
    with pytest.raises(StudentError, match="is an encoder-decoder"):
        train_student(build(TrainConfig, settings | {"student": student, "device": "cpu"}), progress=False)


def test_a_loss_of_labels_says_what_the_cache_lacks():
    refusal = LabelMSE(weight=1.0).incompatibility(TeacherContext())
    assert refusal.startswith("it needs the corpus's labels, which are numbers, and the cache holds top-k targets")


@pytest.fixture
def of_classes(tmp_path):
    """A cache of three classes, and what trains a student on it."""
    found = TINY_TASKS["sequence-classification"].write(tmp_path)
    dump_teacher(dump_config("sequence-classification", found, tmp_path / "cache"), progress=False)

    def train(model):
        student = {"model": saved(tmp_path / "other", model, bert_tokenizer())}
        settings = {"cache": str(tmp_path / "cache"), "output": str(tmp_path / "run"), "student": student}
        train_student(build(TrainConfig, settings | {"max_steps": 1, "device": "cpu"}), progress=False)
        return json.loads((tmp_path / "run" / "config.json").read_text())

    return train


def test_a_student_with_a_head_of_other_classes_is_told(of_classes):
    with pytest.raises(StudentError, match="such as a head with another number of classes"):
        of_classes(bert("BertForSequenceClassification", num_labels=2))


def test_a_student_says_of_which_kind_its_classes_are(of_classes):
    model = bert("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification")
    assert of_classes(model)["problem_type"] == "single_label_classification"


def test_kept_layers_leave_rotary_frequencies_as_exact_as_they_were(tmp_path):
    settings = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **settings)).save_pretrained(tmp_path / "whole")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    student = with_layers(whole, [0, 2], "it")
    assert student.dtype == torch.bfloat16
    for name, buffer in whole.named_buffers():
        assert torch.equal(dict(student.named_buffers())[name], buffer), name


def test_a_bi_encoder_is_no_teacher_of_rankings_yet(tmp_path):
    found = TINY_TASKS["ranking"].write(tmp_path)
    config_file = tmp_path / "teacher" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"kdcache_bi_encoder": {"scale": 20.0}}))
    with pytest.raises(TeacherError, match="teacher is a bi-encoder, and teachers of task ranking read"):
        dump_teacher(dump_config("ranking", found, tmp_path / "cache"), progress=False)


def test_a_blank_text_is_none_with_a_prefix_too(tmp_path):
    found = TINY_TASKS["embedding"].write(tmp_path)
    found["corpus"] = written(tmp_path / "corpus.jsonl", [{"text": "   "}, {"text": "the cat"}])
    settings = {"max_length": 16, "prefix": "the "}
    manifest = dump_teacher(dump_config("embedding", found, tmp_path / "cache", sequences=settings), progress=False)
    assert (manifest.manifest.num_sequences, manifest.manifest.corpus.num_documents) == (1, 2)


def test_a_target_longer_than_the_decoder_takes_is_told(tmp_path):
    config = BartConfig(
        vocab_size=len(bert_tokenizer()),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        decoder_start_token_id=2,
        forced_eos_token_id=3,
    )
    found = {"teacher": saved(tmp_path / "bart", BartForConditionalGeneration(config), bert_tokenizer())}
    found["corpus"] = written(tmp_path / "corpus.jsonl", [{"input": "the cat", "target": "the cat sat " * 16}])
    settings = {"max_length": 16, "max_target_length": 60}
    with pytest.raises(ConfigError, match=r"has 54 positions, but .* was made for 32"):
        dump_teacher(dump_config("seq2seq-lm", found, tmp_path / "cache", sequences=settings), progress=False)
