"""Evaluation of classifiers: every number against whole softmaxes in float64, labelled or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.evaluate import Evaluation, evaluate_students
from kdcache.train import TrainConfig, train_student
from tests.task_models import SENTENCES, TINY_TASKS, WORDS, bert_tokenizer

NAMES = ("bad", "fair", "good")
EVERY = np.random.default_rng(5)
TEXTS = [*SENTENCES, *(" ".join(EVERY.choice(WORDS.split(), EVERY.integers(1, 12))) for _ in range(60))]


def make(path: Path, labels: list[Any]) -> dict[str, str]:
    """Models, and a cache of all texts in several shards; a label of ``...`` stands for no such column."""
    rows = [
        {"text": text} | ({} if label is ... else {"label": label}) for text, label in zip(TEXTS, labels, strict=True)
    ]
    found = TINY_TASKS["sequence-classification"].write(path)
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "output": str(path / "cache"),
        "task": "sequence-classification",
        "teacher": {"model": found["teacher"], "device": "cpu"},
        "corpus": {"paths": [found["corpus"]]},
        "sequences": {"max_length": 32},
        "shard_positions": 25,
    }
    dump_teacher(build(DumpConfig, settings), progress=False)
    return found | {"cache": str(path / "cache")}


def judged(found: dict[str, str], **settings: Any) -> Evaluation:
    return evaluate_students(
        found["cache"], [found["student"]], device="cpu", progress=False, batch_tokens=100, **settings
    )


def log_probs(path: str) -> np.ndarray:
    """Log-probabilities [P, C] of a model at every text, one at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        logits = [model(**bert_tokenizer()(text, return_tensors="pt")).logits[0].double() for text in TEXTS]
    return torch.stack(logits).log_softmax(-1).numpy()


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    bins = np.ceil(confidence * 15).astype(int)
    parts = [(bins == b).mean() * abs(correct[bins == b].mean() - confidence[bins == b].mean()) for b in set(bins)]
    return float(sum(parts))


def f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    classes = sorted({*predicted.tolist(), *actual.tolist()})
    parts = [
        2 * ((predicted == c) & (actual == c)).sum() / ((predicted == c).sum() + (actual == c).sum()) for c in classes
    ]
    return float(np.mean(parts))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    labels = [[*NAMES, None][n] for n in np.random.default_rng(1).integers(0, 4, len(TEXTS))]
    return make(tmp_path_factory.mktemp("labelled"), labels) | {"labels": json.dumps(labels)}


def test_every_number_equals_a_dense_oracle(labelled):
    evaluation = judged(labelled)
    labels = np.array([-1 if name is None else NAMES.index(name) for name in json.loads(labelled["labels"])])
    known = labels >= 0
    log_t = log_probs(labelled["teacher"])
    assert 0 < known.sum() < len(labels)
    assert evaluation.num_targets == len(TEXTS)
    [student] = evaluation.students
    for row, log_p in ((evaluation.teacher, log_t), (student, log_probs(labelled["student"]))):
        top1, confidence = log_p.argmax(1), np.exp(log_p.max(1))
        assert row.top1_accuracy == pytest.approx((top1 == labels)[known].mean())
        assert row.metrics == {"macro_f1": pytest.approx(f1(top1[known], labels[known]))}
        assert row.loss == pytest.approx(-log_p[known, labels[known]].mean(), rel=1e-4)
        assert row.ece == pytest.approx(calibration_error(confidence[known], (top1 == labels)[known]), abs=1e-5)
        assert row.perplexity is None
        assert row.kept_mass is None
    log_p = log_probs(labelled["student"])
    assert student.kl == pytest.approx((np.exp(log_t) * (log_t - log_p)).sum(1).mean(), rel=1e-4)
    assert student.agreement == pytest.approx((log_p.argmax(1) == log_t.argmax(1)).mean())
    assert 0 < student.agreement < 1
    assert evaluation.teacher.entropy == pytest.approx(-(np.exp(log_t) * log_t).sum(1).mean(), rel=1e-4)


def test_the_table_names_f1_and_leaves_empty_columns_out(labelled):
    table = judged(labelled).table(markdown=True)
    heading = table.splitlines()[0]
    assert "macro f1" in heading
    assert "top-1" in heading
    assert "perplexity" not in heading
    assert "kept mass" not in heading


@pytest.mark.parametrize("label", [None, ...])
def test_an_unlabelled_cache_is_judged_against_the_teacher_alone(label, tmp_path):
    evaluation = judged(make(tmp_path, [label] * len(TEXTS)))
    [student] = evaluation.students
    assert student.kl is not None
    assert student.kl > 0
    assert student.agreement is not None
    assert evaluation.teacher.entropy is not None
    for row in (student, evaluation.teacher):
        assert (row.loss, row.perplexity, row.top1_accuracy, row.ece) == (None,) * 4
        assert row.metrics == {}
    heading = evaluation.table().splitlines()[0]
    assert "KL" in heading
    assert "top-1" not in heading
    assert json.loads(json.dumps(evaluation.to_dict()))["students"][0]["loss"] is None


def test_a_student_learns_from_an_unlabelled_cache(tmp_path):
    found = make(tmp_path, [...] * len(TEXTS))
    config = {
        "cache": found["cache"],
        "student": {"model": found["student"]},
        "output": str(tmp_path / "run"),
        "max_steps": 40,
        "learning_rate": 0.01,
        "batch_sequences": 16,
    }
    train_student(build(TrainConfig, config), progress=False)
    before, after = evaluate_students(
        found["cache"], [found["student"], str(tmp_path / "run")], device="cpu", progress=False
    ).students
    assert after.kl < 0.7 * before.kl
    assert after.agreement > before.agreement
