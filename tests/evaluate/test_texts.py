"""Texts that students write, judged against the corpus's own targets."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import ConfigError
from kdcache.evaluate import evaluate_students
from kdcache.evaluate.texts import scores
from tests.cli.conftest import run  # noqa: F401
from tests.task_models import SENTENCES, TINY_TASKS, t5
from tests.write.test_write_targets import tokenizer

PAIRS = [(text, SENTENCES[n - 1]) for n, text in enumerate(SENTENCES)]


def make(path: Path, rows: list[dict[str, Any]], task: str = "seq2seq-lm") -> dict[str, str]:
    """Dump a tiny teacher over ``rows``; return where everything is."""
    t5(seed=1).save_pretrained(path / "teacher")
    tokenizer().save_pretrained(path / "teacher")
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "output": str(path / "cache"),
        "task": task,
        "teacher": {"model": str(path / "teacher"), "device": "cpu"},
        "corpus": {"paths": [str(path / "corpus.jsonl")]},
        "sequences": {"max_length": 40, "max_target_length": 24},
        "targets": {"top_k": 8},
        "shard_positions": 20,
    }
    dump_teacher(build(DumpConfig, config), progress=False)
    return {"cache": str(path / "cache"), "teacher": str(path / "teacher")}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of the corpus's own targets."""
    return make(tmp_path_factory.mktemp("texts"), [{"input": text, "target": target} for text, target in PAIRS])


def written_by_model(beams: int) -> list[str]:
    """What the model writes of each input, alone."""
    model, encoder = t5(seed=1).eval(), tokenizer()
    texts = []
    for text, _ in PAIRS:
        ids = torch.tensor([encoder(text)["input_ids"]])
        more = {"num_beams": beams, "max_new_tokens": 24, "suppress_tokens": list(range(len(encoder), 64))}
        texts.append(encoder.decode(model.generate(ids, **more)[0], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("beams", [1, 2])
def test_texts_are_the_students_own_and_judged_by_the_libraries(beams: int, found: dict[str, str]) -> None:
    evaluation = evaluate_students(
        found["cache"], [found["teacher"]], device="cpu", generate=100, beams=beams, progress=False
    )
    texts, references = written_by_model(beams), [target for _, target in PAIRS]
    pairs = list(zip(texts, references, strict=True))
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    expected = {
        "chrf": sacrebleu.corpus_chrf(texts, [references]).score,
        "rouge_l": 100 * np.mean([rouge.score(right, text)["rougeL"].fmeasure for text, right in pairs]),
    }
    assert evaluation.students[0].metrics == pytest.approx(expected)
    assert expected["chrf"] > 0
    # What the teacher would write is not in a cache of the corpus's targets.
    assert evaluation.teacher.metrics == {"chrf": None, "rouge_l": None}
    assert evaluation.students[0].kl is not None


def test_the_teachers_texts_are_judged_where_the_cache_has_them(tmp_path: Path) -> None:
    rows = [{"input": text, "target": f"{gold} and", "reference": gold} for text, gold in PAIRS]
    rows[2]["reference"] = None
    found = make(tmp_path, rows)
    evaluation = evaluate_students(found["cache"], [found["teacher"]], device="cpu", generate=100, progress=False)
    kept = [n for n in range(len(PAIRS)) if n != 2]
    golds = [PAIRS[n][1] for n in kept]
    assert evaluation.teacher.metrics == pytest.approx(scores([f"{gold} and" for gold in golds], golds))
    texts = written_by_model(1)
    assert evaluation.students[0].metrics == pytest.approx(scores([texts[n] for n in kept], golds))
    assert (evaluation.teacher.metrics["chrf"] or 0) > 80


def test_a_part_of_the_cache(found: dict[str, str]) -> None:
    one = evaluate_students(found["cache"], [found["teacher"]], device="cpu", generate=1, progress=True)
    expected = scores(written_by_model(1)[:1], [PAIRS[0][1]])
    assert one.students[0].metrics == pytest.approx(expected)


def test_scores_of_equal_and_of_different_texts() -> None:
    assert scores(SENTENCES, SENTENCES) == pytest.approx({"chrf": 100, "rouge_l": 100})
    assert scores(["xyz"], ["the cat"]) == pytest.approx({"chrf": 0, "rouge_l": 0})
    halves = scores(["the cat", "xyz"], ["the cat", "the dog"])
    assert halves["rouge_l"] == pytest.approx(50)


def test_without_students_there_is_nothing_to_write(found: dict[str, str]) -> None:
    assert evaluate_students(found["cache"], [], device="cpu", generate=5, progress=False).students == ()


def test_a_cache_of_another_task(tmp_path: Path) -> None:
    where = TINY_TASKS["sequence-classification"].write(tmp_path)
    config = {
        "output": str(tmp_path / "cache"),
        "task": "sequence-classification",
        "teacher": {"model": where["teacher"], "device": "cpu"},
        "corpus": {"paths": [where["corpus"]]},
        "sequences": TINY_TASKS["sequence-classification"].settings,
    }
    dump_teacher(build(DumpConfig, config), progress=False)
    with pytest.raises(ConfigError, match=r"generate is for task seq2seq-lm.*is of task sequence-classification"):
        evaluate_students(str(tmp_path / "cache"), [], device="cpu", generate=5)


@pytest.mark.parametrize("setting", [{"generate": 0}, {"generate": 3, "beams": 0}])
def test_numbers_below_one(setting: dict[str, int], found: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1, found 0"):
        evaluate_students(found["cache"], [], device="cpu", **setting)


def test_without_the_packages(found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find(name))
    with pytest.raises(ConfigError, match=r"not installed \(sacrebleu\): pip install 'kdcache\[text\]'"):
        evaluate_students(found["cache"], [], device="cpu", generate=5)


def test_references_that_are_no_texts(tmp_path: Path) -> None:
    rows = [{"input": text, "target": gold, "reference": [gold]} for text, gold in PAIRS]
    found = make(tmp_path, rows)
    with pytest.raises(ConfigError, match="'reference' of the cache holds list, expected texts"):
        evaluate_students(found["cache"], [], device="cpu", generate=5, progress=False)


def test_the_command(run: Any, found: dict[str, str]) -> None:  # noqa: F811
    arguments = ["evaluate", "--cache", found["cache"], "--student", found["teacher"], "--generate", "3", "-q"]
    outcome = run(*arguments, "--device", "cpu", "--markdown")
    assert outcome.code == 0, outcome.err
    assert "| chrf | rouge l |" in outcome.out
