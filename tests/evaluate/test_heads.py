"""Students without the head of the task, or with another one, are not evaluated: their numbers would be chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kdcache.cache import open_cache
from kdcache.errors import StudentError
from kdcache.evaluate import evaluate_students
from kdcache.students import StudentConfig, load_student
from tests.task_models import TINY_TASKS, bert, bert_tokenizer


def save(path: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(path)
    (tokenizer or bert_tokenizer()).save_pretrained(path)
    return str(path)


def refused(cache: Path, student: str, words: str) -> None:
    with pytest.raises(StudentError, match=words):
        evaluate_students(str(cache), [student], device="cpu", progress=False)


def test_bodies_without_a_head_are_refused_by_evaluation_and_trained_by_training(subtests, task_caches, tmp_path):
    heads = {
        "masked-lm": r"has no head for task masked-lm: it lacks \d+ of the weights of a BertForMaskedLM",
        "sequence-classification": r"lacks 2 of the weights of a BertForSequenceClassification.*random numbers",
        "ranking": r"lacks 2 of the weights of a BertForSequenceClassification.*random numbers",
    }
    body = save(tmp_path / "body", bert("BertModel", seed=2))
    for task, words in heads.items():
        with subtests.test(task):
            refused(task_caches[task], body, words)
            cache = open_cache(task_caches[task])
            assert load_student(StudentConfig(model=body), cache.manifest, cache.tokenizer_dir()).model is not None


def test_heads_of_other_tasks_are_refused(subtests, task_caches, tmp_path):
    masked = save(tmp_path / "masked", bert("BertForMaskedLM", seed=3))
    tagger = save(tmp_path / "tagger", bert("BertForTokenClassification", seed=3, num_labels=7))
    classifier = save(tmp_path / "classes", bert("BertForSequenceClassification", seed=3, num_labels=9))
    for name, task, student, words in (
        ("masked-lm as a classifier", "sequence-classification", masked, "has no head for task sequence-class"),
        ("a classifier as masked-lm", "masked-lm", classifier, "has no head for task masked-lm"),
        ("other numbers of classes", "sequence-classification", classifier, "another number of classes"),
        ("classes of tokens", "sequence-classification", tagger, "no head|another number of classes"),
        ("classes as scores", "ranking", classifier, "another number of classes"),
    ):
        with subtests.test(name):
            refused(task_caches[task], student, words)


def test_an_embedder_that_lacks_layers_is_incomplete_not_without_a_head(task_caches, tmp_path):
    """The weights of a model without a head have no prefix, and counted as those of a head once."""
    path = save(tmp_path / "embedder", TINY_TASKS["embedding"].student())
    weights = load_file(f"{path}/model.safetensors")
    kept = {name: values for name, values in weights.items() if "layer.0." not in name}
    assert 0 < len(kept) < len(weights)
    save_file(kept, f"{path}/model.safetensors", {"format": "pt"})
    cache = open_cache(task_caches["embedding"])
    with pytest.raises(StudentError, match=r"lacks \d+ of the weights of a BertModel.*incomplete"):
        load_student(StudentConfig(model=path), cache.manifest, cache.tokenizer_dir())
    refused(task_caches["embedding"], path, "incomplete")


def test_classes_of_other_names_are_a_warning(task_caches, tmp_path):
    cache = task_caches["sequence-classification"]
    labels = open_cache(cache).manifest.outputs.labels
    for number, (names, words) in enumerate(
        (
            ((*labels[:-1], "other"), "calls its classes"),
            (labels, None),
            ([f"LABEL_{n}" for n in range(len(labels))], None),
        )
    ):
        model = bert("BertForSequenceClassification", seed=3, id2label=dict(enumerate(names)))
        student = save(tmp_path / str(number), model)
        warnings = evaluate_students(str(cache), [student], device="cpu", progress=False).warnings
        assert [words in warning for warning in warnings] == ([True] if words else [])
