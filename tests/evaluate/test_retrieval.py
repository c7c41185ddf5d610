"""Search by embeddings: which texts are queries, and the metrics against the plainest way to compute them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from kdcache.cache import open_cache
from kdcache.cli.evaluate import command
from kdcache.dump import dump_teacher
from kdcache.errors import ConfigError
from kdcache.evaluate import evaluate_students
from kdcache.evaluate.measures import Answers
from kdcache.evaluate.retrieval import Retrieval, best, load_retrieval, read_qrels
from kdcache.schema import OUTPUTS_FIELD
from tests.task_models import SENTENCES, TINY_TASKS, dump_config

#: Ids of queries are ids of documents, too.
QUERIES = {"1": "the cat sat on a mat", "2": "the sun and the moon", "3": "a red house"}
DOCUMENTS = {str(n): text for n, text in enumerate(SENTENCES)}
QRELS = "query-id\tcorpus-id\tscore\n1\t0\t2\n1\t3\t1\n1\t4\t0\n2\t5\t1\n2\t7\t1\n"


def write(path: Path, rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in rows.items()))
    return str(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("retrieval")
    made = TINY_TASKS["embedding"].write(path)
    files = [write(path / "queries.jsonl", QUERIES), write(path / "corpus.jsonl", DOCUMENTS)]
    (path / "qrels.tsv").write_text(QRELS)
    dump_teacher(dump_config("embedding", made, path / "cache", corpus={"paths": files}), progress=False)
    return made | {"cache": str(path / "cache"), "qrels": str(path / "qrels.tsv"), "path": path}


def plain_metrics(scores: dict[str, float], grades: dict[str, float], cut: int = 10) -> tuple[float, float, float]:
    ranked = sorted(scores, key=lambda name: -scores[name])[:cut]
    dcg = sum(grades.get(name, 0) / math.log2(rank + 1) for rank, name in enumerate(ranked, 1))
    ideal = sum(g / math.log2(rank + 1) for rank, g in enumerate(sorted(grades.values(), reverse=True)[:cut], 1))
    recall = sum(name in grades for name in ranked) / len(grades)
    first = next((1 / rank for rank, name in enumerate(ranked, 1) if name in grades), 0.0)
    return dcg / ideal, recall, first


def test_metrics_are_those_of_ranking_every_document_for_every_judged_query(found):
    cache = open_cache(found["cache"])
    evaluation = evaluate_students(
        found["cache"], [], qrels=found["qrels"], id_column="_id", device="cpu", progress=False
    )
    vectors = cache.read(range(len(cache)), fields=(OUTPUTS_FIELD,)).hidden[OUTPUTS_FIELD]
    table = cache.sequence_table().to_pylist()
    documents = {r["_id"]: v for r, v in zip(table, vectors, strict=True) if "corpus" in r["document_id"]}
    queries = {r["_id"]: v for r, v in zip(table, vectors, strict=True) if "queries" in r["document_id"]}
    rows = []
    for query, grades in (("1", {"0": 2, "3": 1}), ("2", {"5": 1, "7": 1})):
        scores = {
            name: float(queries[query] @ v / np.linalg.norm(v) / np.linalg.norm(queries[query]))
            for name, v in documents.items()
        }
        rows.append(plain_metrics(scores, grades))
    ndcg, recall, mrr = np.mean(rows, axis=0)
    metrics = evaluation.teacher.metrics
    assert metrics["ndcg_at_10"] == pytest.approx(ndcg)
    assert metrics["recall_at_10"] == pytest.approx(recall)
    assert metrics["mrr_at_10"] == pytest.approx(mrr)
    assert metrics["recall_at_100"] == 1


def test_the_command_judges_students_too(found):
    arguments = ["--cache", found["cache"], "--qrels", found["qrels"], "--id-column", "_id"]
    arguments += ["--student", found["teacher"], "--student", found["student"], "--device", "cpu", "-q"]
    result = CliRunner().invoke(command, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    same, other = (row["metrics"] for row in data["students"])
    for name in ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10"):
        assert same[name] == pytest.approx(data["teacher"]["metrics"][name])
    assert other["teacher_cosine"] < 0.999 < same["teacher_cosine"]
    shown = CliRunner().invoke(command, [*arguments, "--markdown"])
    assert "ndcg at 10" in shown.output


def test_ids_are_those_of_kdcache_unless_a_column_is_named(found):
    table = open_cache(found["cache"]).sequence_table().to_pylist()
    names = {("corpus" in r["document_id"], r["_id"]): r["document_id"] for r in table}
    qrels = found["path"] / "own.tsv"
    qrels.write_text(f"{names[False, '1']}\t{names[True, '0']}\t1\n")
    retrieval = load_retrieval(open_cache(found["cache"]), str(qrels))
    assert len(retrieval.queries_Q) == 1
    assert len(retrieval.documents_M) == len(DOCUMENTS)


@pytest.mark.parametrize(
    "text",
    [QRELS, QRELS.split("\n", 1)[1], "1 0 0 2\n1 0 3 1\n1 0 4 0\n\n2 0 5 1\n2 0 7 1\n"],
    ids=["beir", "bare", "trec"],
)
def test_judgements_are_read_in_all_their_forms(text, tmp_path):
    (tmp_path / "qrels").write_text(text)
    assert read_qrels(str(tmp_path / "qrels")) == {"1": {"0": 2, "3": 1}, "2": {"5": 1, "7": 1}}


def test_a_document_that_is_missing_cannot_be_found(found, caplog):
    qrels = found["path"] / "missing.tsv"
    qrels.write_text("1\t0\t1\n1\tgone\t1\n")
    retrieval = load_retrieval(open_cache(found["cache"]), str(qrels), "_id")
    assert "1 of 2 judged documents" in caplog.text
    vectors = np.zeros((len(QUERIES) + len(DOCUMENTS), 2), np.float32)
    vectors[:, 0] = 1
    metrics = retrieval.measure(Answers(vectors, np.zeros(len(vectors)), np.arange(len(vectors))))
    assert metrics["recall_at_100"] == 0.5
    assert metrics["ndcg_at_10"] == pytest.approx(1 / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("9\t0\t1\n", {"id_column": "_id"}, "1 of 1 query .* is not in the cache, such as '9'.*column _id"),
        ("1\tx\t1\n", {"id_column": "_id"}, "no document of .* is in the cache, such as 'x'"),
        ("1\t0\t1\n", {}, "is not in the cache, such as '1'.*--id-column"),
        ("1\t0\t1\n", {"id_column": "_idd"}, "no column '_idd'; did you mean '_id'"),
        ("1\t0\t1\nwhat\n", {"id_column": "_id"}, "line 2: expected 'query document grade'"),
        ("1\t0\t0\n", {"id_column": "_id"}, "names no relevant document"),
        ("1\t0\t1\n", {"id_column": "_id", "limit_sequences": 3}, "a whole cache of task embedding"),
    ],
)
def test_judgements_that_do_not_fit_are_refused(text, options, message, found, tmp_path):
    (tmp_path / "qrels.tsv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        evaluate_students(
            found["cache"], [], qrels=str(tmp_path / "qrels.tsv"), device="cpu", progress=False, **options
        )


def test_an_id_that_two_documents_have_is_refused(found, tmp_path):
    files = [write(tmp_path / name, {"1": "a cat", "2": f"a {name}"}) for name in ("a.jsonl", "b.jsonl", "q.jsonl")]
    (tmp_path / "qrels.tsv").write_text("1\t2\t1\n")
    dump_teacher(dump_config("embedding", found, tmp_path / "cache", corpus={"paths": files}), progress=False)
    with pytest.raises(ConfigError, match=r"several (documents|queries) of the cache have the id"):
        load_retrieval(open_cache(str(tmp_path / "cache")), str(tmp_path / "qrels.tsv"), "_id")


def test_the_best_scores_are_in_order_and_ties_by_place():
    scores = np.array([0.5, 0.9, 0.5, 0.1, 0.5, 0.9])
    assert best(scores, 3).tolist() == [1, 5, 0]
    assert best(scores, 10).tolist() == [1, 5, 0, 2, 4, 3]


def test_many_queries_are_scored_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 5)).astype(np.float32)
    retrieval = Retrieval(np.arange(10), np.arange(10, 60), [{n: 1.0} for n in range(10)], [[] for _ in range(10)])
    answers = Answers(vectors, np.zeros(60, np.float32), np.arange(60))
    whole = retrieval.measure(answers)
    monkeypatch.setattr("kdcache.evaluate.retrieval._SCORES_AT_ONCE", 120)
    assert retrieval.measure(answers) == pytest.approx(whole)
