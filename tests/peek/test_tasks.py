"""What ``kdcache peek`` and ``kdcache inspect`` show of every task: the corpus's rows beside the teacher's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.errors import CacheError, ConfigError
from kdcache.peek import PeekContext, View, peek_cache
from kdcache.tasks import TASKS
from tests.cli.conftest import Run, run
from tests.task_models import TINY_TASKS

__all__ = ["run"]

_TOP = {"sequence", "metadata"}
#: Members of the JSON, which scripts rely on.
KEYS: dict[str, set[str]] = {
    "causal-lm": {"text", "positions"},
    "masked-lm": {"text", "positions"},
    "seq2seq-lm": {"text", "target", "positions"},
    "sequence-classification": {"text", "text_pair", "label", "top", "entropy"},
    "sequence-regression": {"text", "text_pair", "scores", "label"},
    "embedding": {"texts", "width", "pooling", "normalised", "cosine", "label"},
    "ranking": {"query", "num_documents", "documents"},
}
_POSITION = {"position", "before", "gold", "top", "tail", "entropy", "counts"}
#: Members of the items of their lists.
ITEMS = {
    ("causal-lm", "positions"): _POSITION,
    ("masked-lm", "positions"): _POSITION | {"fed", "after"},
    ("seq2seq-lm", "positions"): _POSITION,
    ("sequence-classification", "top"): {"name", "id", "probability", "logit"},
    ("embedding", "texts"): {"text", "norm", "numbers"},
    ("ranking", "documents"): {"document", "text", "rank", "score", "relevance"},
}


@pytest.fixture(scope="session")
def caches(task_caches: dict[str, Path], dumped: Path) -> dict[str, Path]:
    return {**task_caches, "causal-lm": dumped}


def shown(run: Run, cache: Path, *options: object) -> Any:
    outcome = run("peek", cache, "--json", *options)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_every_task_has_a_view() -> None:
    assert set(TASKS) == set(KEYS)


def test_a_new_task_may_bring_a_view_of_its_own(
    task_caches: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Length(View):
        num_tokens: int

    class Measured(type(TASKS["sequence-regression"])):  # type: ignore[misc]
        def view(self, context: PeekContext) -> View:
            return Length(context.number, context.metadata, len(context.batch.tokens_T))

    cache = task_caches["sequence-regression"]
    assert shown(run, cache).keys() == _TOP | {"text", "text_pair", "scores", "label"}
    monkeypatch.setitem(TASKS._used, "sequence-regression", Measured())
    found = shown(run, cache)
    assert found.keys() == _TOP | {"num_tokens"}
    assert run("peek", cache).out.endswith(f"\nnum_tokens: {found['num_tokens']}\n")


@pytest.mark.parametrize("task", TASKS)
def test_members_of_the_json(task: str, caches: dict[str, Path], run: Run) -> None:
    for index in range(len(open_cache(str(caches[task])))):
        result = shown(run, caches[task], "--sequence", index)
        assert set(result) == _TOP | KEYS[task]
        for name, items in ((name, keys) for (owner, name), keys in ITEMS.items() if owner == task):
            assert result[name]
            assert all(set(item) == items for item in result[name])
        assert result["metadata"]["sequence"] == index


@pytest.mark.parametrize("task", TASKS)
def test_every_sequence_can_be_shown_to_people(task: str, caches: dict[str, Path], run: Run) -> None:
    for index in range(len(open_cache(str(caches[task])))):
        outcome = run("peek", caches[task], "--sequence", index)
        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith(f"sequence {index}: ")


def test_masked_lm(caches: dict[str, Path], run: Run) -> None:
    cache = open_cache(str(caches["masked-lm"]))
    batch = cache.read([1])
    result = shown(run, caches["masked-lm"], "--sequence", 1, "--top", 3)
    words = result["text"].split()
    plain = TINY_TASKS["masked-lm"].rows[0]["text"].split()
    assert [position["position"] for position in result["positions"]] == batch.token_index_P.tolist()
    for row, position in enumerate(result["positions"]):
        place = position["position"]
        assert position["fed"] == words[place]
        assert position["before"].split() == words[:place]
        assert position["after"].split() == words[place + 1 :][:12]
        assert position["gold"]["token"] == plain[place - 1]
        assert position["gold"]["probability"] == pytest.approx(np.exp(batch.targets.gold_logprob_P[row]))
        assert [choice["id"] for choice in position["top"]] == batch.targets.ids_PK[row, :3].tolist()
    people = run("peek", caches["masked-lm"], "--sequence", 1, "--at", batch.token_index_P[-1]).out
    assert people.count("position ") == 1
    assert f"position {batch.token_index_P[-1]}: " in people
    assert "|[MASK]|" in people


def test_a_place_without_a_row_is_told_with_those_that_have_one(caches: dict[str, Path], run: Run) -> None:
    places = open_cache(str(caches["masked-lm"])).read([0]).token_index_P.tolist()
    message = run("peek", caches["masked-lm"], "--at", 0).message()
    assert message == f"sequence 0 has no position 0; it has {', '.join(map(str, places))}"


def test_seq2seq_lm(caches: dict[str, Path], run: Run) -> None:
    batch = open_cache(str(caches["seq2seq-lm"])).read([5])
    target = batch.tokens_T[batch.segment_ids_T == 1]
    result = shown(run, caches["seq2seq-lm"], "--sequence", 5, "--at", f"0,2,{len(target) - 1}")
    assert [position["position"] for position in result["positions"]] == [0, 2, len(target) - 1]
    assert result["text"].replace(" ", "").replace("\u2581", "") == "redsunandbluemoon</s>"
    assert result["positions"][0]["before"] == ""
    for position in result["positions"]:
        row = position["position"]
        assert position["gold"]["id"] == target[row]
        assert position["tail"] == pytest.approx(np.exp(batch.targets.log_tail_P[row]))
        assert result["target"].startswith(position["before"])
    assert result["positions"][-1]["gold"]["token"] == "</s>"
    people = run("peek", caches["seq2seq-lm"], "--sequence", 5).out
    assert people.count("input: ") == people.count("target: ") == 1


def test_classes(caches: dict[str, Path], run: Run) -> None:
    rows = TINY_TASKS["sequence-classification"].rows
    cache = open_cache(str(caches["sequence-classification"]))
    for index, row in enumerate(rows):
        result = shown(run, caches["sequence-classification"], "--sequence", index)
        assert row["text"].startswith(result["text"])
        assert row["text_pair"].startswith(result["text_pair"])
        logits = cache.read([index], fields=["outputs"]).hidden["outputs"][0]
        probabilities = np.exp(logits) / np.exp(logits).sum()
        assert [choice["id"] for choice in result["top"]] == np.argsort(-logits).tolist()
        for choice in result["top"]:
            assert choice["name"] == ["bad", "fair", "good"][choice["id"]]
            assert choice["logit"] == pytest.approx(float(logits[choice["id"]]))
            assert choice["probability"] == pytest.approx(float(probabilities[choice["id"]]), rel=1e-5)
        assert (result["label"] and result["label"]["name"]) == row["label"]
        assert result["entropy"] == pytest.approx(-(probabilities * np.log(probabilities)).sum(), rel=1e-4)


def test_the_corpus_own_class_is_marked_even_where_the_teacher_finds_it_unlikely(
    caches: dict[str, Path], run: Run
) -> None:
    for index, row in enumerate(TINY_TASKS["sequence-classification"].rows):
        lines = run("peek", caches["sequence-classification"], "--sequence", index, "--top", 1).out.splitlines()
        marked = [line.split()[2] for line in lines if line.startswith("  * ")]
        assert marked == ([] if row["label"] is None else [row["label"]])
        assert any(f"label {row['label']}" in line or "no label" in line for line in lines)


def test_score(caches: dict[str, Path], run: Run) -> None:
    cache = open_cache(str(caches["sequence-regression"]))
    for index, row in enumerate(TINY_TASKS["sequence-regression"].rows):
        result = shown(run, caches["sequence-regression"], "--sequence", index)
        score = float(cache.read([index], fields=["outputs"]).hidden["outputs"][0, 0])
        assert result["scores"] == [pytest.approx(score)]
        assert result["label"] == row["label"]
        people = run("peek", caches["sequence-regression"], "--sequence", index).out
        assert f"score {score:.4f}, label {'none' if row['label'] is None else format(row['label'], '.4f')}" in people


def test_embedding(caches: dict[str, Path], run: Run) -> None:
    cache = open_cache(str(caches["embedding"]))
    for index, row in enumerate(TINY_TASKS["embedding"].rows):
        result = shown(run, caches["embedding"], "--sequence", index, "--top", 3)
        vectors = cache.read([index], fields=["outputs"]).hidden["outputs"].astype(np.float64)
        texts = [text for text in (row["text"], row["text_pair"]) if text]
        assert len(result["texts"]) == len(vectors) == len(texts)
        for item, text, vector in zip(result["texts"], texts, vectors, strict=True):
            assert text.startswith(item["text"])
            assert item["numbers"] == pytest.approx(vector[:3].tolist())
            assert item["norm"] == pytest.approx(np.linalg.norm(vector))
        assert (result["width"], result["pooling"], result["normalised"]) == (16, "mean", True)
        assert result["label"] == row["label"]
        if len(texts) == 1:
            assert result["cosine"] is None
        else:
            lengths = np.linalg.norm(vectors, axis=1)
            assert result["cosine"] == pytest.approx(vectors[0] @ vectors[1] / lengths.prod())
            assert "cosine " in run("peek", caches["embedding"], "--sequence", index).out


def test_ranking(caches: dict[str, Path], run: Run) -> None:
    cache = open_cache(str(caches["ranking"]))
    for index, row in enumerate(TINY_TASKS["ranking"].rows):
        scores = cache.read([index], fields=["outputs"]).hidden["outputs"][:, 0]
        result = shown(run, caches["ranking"], "--sequence", index)
        assert result["query"] == row["query"]
        assert result["num_documents"] == len(row["documents"])
        assert [item["document"] for item in result["documents"]] == np.argsort(-scores, kind="stable").tolist()
        assert [item["rank"] for item in result["documents"]] == list(range(1, len(scores) + 1))
        for item in result["documents"]:
            assert row["documents"][item["document"]].startswith(item["text"])
            assert item["score"] == pytest.approx(float(scores[item["document"]]))
            assert item["relevance"] == row["relevance"][item["document"]]


def test_relevant_documents_are_shown_wherever_the_teacher_has_them(caches: dict[str, Path], run: Run) -> None:
    ranks = set()
    for index in range(len(TINY_TASKS["ranking"].rows)):
        documents = shown(run, caches["ranking"], "--sequence", index, "--top", 1)["documents"]
        assert documents[0]["rank"] == 1
        assert all(item["relevance"] > 0 for item in documents[1:])
        ranks |= {item["rank"] for item in documents if item["relevance"] > 0}
        people = run("peek", caches["ranking"], "--sequence", index, "--top", 1).out
        assert people.count("  * ") == 1
    assert max(ranks) > 1


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.gives != "tokens"])
def test_whole_texts_have_no_positions_to_choose(task: str, caches: dict[str, Path], run: Run) -> None:
    assert f"positions cannot be chosen for task {task}" in run("peek", caches[task], "--at", 0).message()
    with pytest.raises(ConfigError, match="positions cannot be chosen"):
        peek_cache(open_cache(str(caches[task])), positions=[0])


@pytest.mark.parametrize("task", TINY_TASKS)
def test_a_sequence_that_is_not_there(task: str, caches: dict[str, Path]) -> None:
    with pytest.raises(CacheError, match="there is no sequence 999"):
        peek_cache(open_cache(str(caches[task])), 999)


@pytest.mark.parametrize("task", TASKS)
def test_inspect_speaks_of_rows_where_a_position_is_no_token(task: str, caches: dict[str, Path], run: Run) -> None:
    outcome = run("inspect", caches[task])
    assert outcome.code == 0
    unit, other = ("token", "row") if TASKS[task].gives == "tokens" else ("row", "token")
    assert f"bytes/{unit} " in outcome.out
    assert f"bytes/{other}" not in outcome.out
    assert ("of one token" in outcome.out) == (task == "causal-lm")
    corpus = json.loads(run("inspect", caches[task], "--json").out)["corpus"]
    assert (f"{corpus['num_truncated']} cut to fit" in outcome.out) == (task != "causal-lm")


def test_inspect_counts_rows_without_a_label(caches: dict[str, Path], run: Run) -> None:
    num_unlabelled = sum(row["label"] is None for row in TINY_TASKS["sequence-classification"].rows)
    assert f"{num_unlabelled} without a label" in run("inspect", caches["sequence-classification"]).out
    for task in ("causal-lm", "masked-lm", "ranking"):
        assert "without a label" not in run("inspect", caches[task]).out


def test_a_cache_of_an_unknown_task_can_be_inspected(caches: dict[str, Path], run: Run, tmp_path: Path) -> None:
    manifest = json.loads((caches["ranking"] / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "task": "of-tomorrow"}))
    outcome = run("inspect", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "of-tomorrow" in outcome.out


def test_looking_needs_no_torch(caches: dict[str, Path]) -> None:
    paths = [str(path) for path in caches.values()]
    code = (
        "import sys\nfrom kdcache.cache import open_cache\nfrom kdcache.peek import peek_cache\n"
        f"print(len([peek_cache(open_cache(path)) for path in {paths!r}]))\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(paths)), "False", "False"]


@pytest.mark.parametrize(
    ("task", "array", "value", "words"),
    [
        ("masked-lm", "token_index_P", 999, "a masked token is at 999"),
        ("sequence-classification", "labels_P", 7, "is 7"),
    ],
)
def test_a_strangers_numbers_are_no_indices(
    task: str, array: str, value: int, words: str, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(str(caches[task]))
    read = cache.read

    def forged(*arguments: Any, **options: Any) -> Any:
        batch = read(*arguments, **options)
        setattr(batch, array, np.full_like(getattr(batch, array), value))
        return batch

    monkeypatch.setattr(cache, "read", forged)
    with pytest.raises(CacheError, match=words):
        peek_cache(cache)


def test_the_corpus_own_class_is_shown_where_few_classes_are_kept(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(str(caches["sequence-classification"]))
    whole = peek_cache(cache, 1).to_dict()
    read = cache.read
    monkeypatch.setattr(cache, "read", lambda indices, **options: read(indices, **options, top_k=1))
    fewer = peek_cache(cache, 1).to_dict()
    assert fewer["label"] == whole["label"] is not None
    assert fewer["top"] == whole["top"][:1]
