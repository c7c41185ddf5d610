"""Task ranking: what becomes of a query and its documents, and what is said of rows that cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.corpus import CorpusConfig, load_corpus
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import CorpusError, TeacherError
from kdcache.models.tokenizer import TextEncoder
from kdcache.schema import OUTPUTS_FIELD, OutputsRecord
from kdcache.tasks import Sequences, task_of
from kdcache.tasks.ranking import RankingSettings
from tests.models.test_bi_encoder import roberta_tokenizer
from tests.task_models import bert, bert_tokenizer

TASK = task_of("ranking")
QUERY, DOCUMENTS = "the cat", ["a dog", "the red moon", "a cat sat"]


def plan(path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, columns: Any = None, **settings: Any) -> Any:
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return planned(path / "corpus.jsonl", tokenizer, columns, **settings)


def planned(file: Path, tokenizer: Any = None, columns: Any = None, **settings: Any) -> Sequences:
    corpus = load_corpus(CorpusConfig(paths=(str(file),), columns=columns or {}), TASK.roles)
    encoder = TextEncoder(tokenizer or bert_tokenizer())
    return TASK.plan(corpus, encoder, RankingSettings(**settings), OutputsRecord(width=1))


def pairs(sequences: Sequences, tokenizer: Any = None) -> list[str]:
    """What a cross-encoder is fed, as text."""
    every = [sequences.sequence(n) for n in range(sequences.num_sequences)]
    batch = TASK.pad_batch(every, pad_id=0)
    real = [row[: mask.sum()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert batch["rows"].tolist() == list(range(len(real)))
    return [" ".join((tokenizer or bert_tokenizer()).convert_ids_to_tokens(row)) for row in real]


def test_a_row_is_a_document_with_its_query(tmp_path: Path) -> None:
    found = plan(tmp_path, [{"query": QUERY, "documents": DOCUMENTS, "relevance": [0, 1, None]}])
    assert pairs(found) == [f"[CLS] the cat [SEP] {document} [SEP]" for document in DOCUMENTS]
    np.testing.assert_array_equal(found.sequence(0).labels_L, [0, 1, np.nan])
    batch = TASK.pad_batch([found.sequence(0)], pad_id=0)
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert (found.num_sequences, found.num_positions, found.num_truncated) == (1, 3, 0)


def test_what_is_fed_is_what_the_tokenizer_makes_of_the_pair(tmp_path: Path) -> None:
    for tokenizer in (bert_tokenizer(), roberta_tokenizer()):
        found = plan(tmp_path, [{"query": QUERY, "documents": DOCUMENTS}], tokenizer)
        expected = [" ".join(tokenizer.convert_ids_to_tokens(tokenizer(QUERY, d)["input_ids"])) for d in DOCUMENTS]
        assert pairs(found, tokenizer) == expected
        assert "</s> </s>" in expected[0] or "[SEP]" in expected[0]


def test_a_null_or_empty_document_keeps_its_place(tmp_path: Path) -> None:
    found = plan(tmp_path, [{"query": QUERY, "documents": [None, "a dog", ""], "relevance": [0, 1, 0]}])
    assert pairs(found) == ["[CLS] the cat [SEP] [SEP]", "[CLS] the cat [SEP] a dog [SEP]", "[CLS] the cat [SEP] [SEP]"]
    np.testing.assert_array_equal(found.sequence(0).labels_L, [0, 1, 0])


@pytest.mark.parametrize("documents", [[], None, [None], ["", None]])
def test_a_query_without_documents_is_left_out_and_counted(tmp_path: Path, documents: Any) -> None:
    rows = [
        {"query": QUERY, "documents": documents},
        {"query": "", "documents": DOCUMENTS},
        {"query": QUERY, "documents": DOCUMENTS},
    ]
    found = plan(tmp_path, rows)
    assert (found.num_sequences, found.num_too_short, found.num_empty) == (1, 1, 1)
    assert "corpus.jsonl:2" in found.table()["document_id"].to_pylist()[0]


def test_long_documents_are_cut_and_queries_are_not(tmp_path: Path) -> None:
    found = plan(tmp_path, [{"query": QUERY, "documents": ["a dog", "the " * 20]}], max_length=9)
    assert pairs(found)[1] == "[CLS] the cat [SEP] the the the the [SEP]"
    assert found.num_truncated == 1
    with pytest.raises(CorpusError, match=r"corpus.jsonl:0: the query has 7 tokens.*max_length of 9.*--max-length"):
        plan(tmp_path, [{"query": "the " * 7, "documents": DOCUMENTS}], max_length=9)


def test_the_first_documents_are_used(tmp_path: Path) -> None:
    row = {"query": QUERY, "documents": DOCUMENTS, "relevance": [0, 1, 1]}
    found = plan(tmp_path, [row], max_documents=2)
    assert pairs(found) == [f"[CLS] the cat [SEP] {document} [SEP]" for document in DOCUMENTS[:2]]
    np.testing.assert_array_equal(found.sequence(0).labels_L, [0, 1])
    assert found.num_truncated == 1


@pytest.mark.parametrize("most", [2, 32])
def test_every_document_needs_its_relevance(tmp_path: Path, most: int) -> None:
    row = {"query": QUERY, "documents": DOCUMENTS, "relevance": [0, 1]}
    with pytest.raises(CorpusError, match=r"corpus.jsonl:0: there are 3 documents, but 2 values of relevance; give"):
        plan(tmp_path, [row], max_documents=most)


def test_relevance_may_be_unknown_or_a_grade_or_a_yes(tmp_path: Path) -> None:
    for given, expected in (
        [None, [math.nan] * 3],
        [[0.5, 2, None], [0.5, 2, math.nan]],
        [[True, False, False], [1, 0, 0]],
    ):
        found = plan(tmp_path, [{"query": QUERY, "documents": DOCUMENTS, "relevance": given}])
        np.testing.assert_array_equal(found.sequence(0).labels_L, np.array(expected, np.float32))
    with pytest.raises(CorpusError, match="expected a number as label, found 'high'"):
        plan(tmp_path, [{"query": QUERY, "documents": DOCUMENTS, "relevance": ["high", "low", "low"]}])


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ("one text", "documents: expected a list of texts, found str; other columns: --column"),
        ([1, 2], "expected a list of texts as documents, found 1 among them"),
        ([{"text": "a dog"}], "expected a list of texts as documents, found .* among them"),
    ],
)
def test_documents_that_are_no_list_of_texts(tmp_path: Path, documents: Any, words: str) -> None:
    with pytest.raises(CorpusError, match=rf"corpus.jsonl:0.*{words}"):
        plan(tmp_path, [{"query": QUERY, "documents": documents}])


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    row = {"claim": QUERY, "passages": DOCUMENTS, "grades": [0, 2, 1]}
    columns = {"query": "claim", "documents": "passages", "relevance": "grades"}
    found = plan(tmp_path, [row], columns=columns)
    assert pairs(found)[0] == "[CLS] the cat [SEP] a dog [SEP]"
    np.testing.assert_array_equal(found.sequence(0).labels_L, [0, 2, 1])
    with pytest.raises(CorpusError, match=r"no column 'documents'.*claim, .*passages.*--column documents=NAME"):
        plan(tmp_path, [row], columns={"query": "claim"})


def test_lists_of_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table({"query": [QUERY], "documents": [DOCUMENTS], "relevance": [[0.0, 1.0, 0.5]]})
    pq.write_table(table, tmp_path / "corpus.parquet")
    found = planned(tmp_path / "corpus.parquet")
    assert len(pairs(found)) == 3
    np.testing.assert_array_equal(found.sequence(0).labels_L, np.array([0, 1, 0.5], np.float32))


# ------------------------------------------------------------------------------------------------------ with a teacher


def dump(path: Path, num_labels: int, rows: list[dict[str, Any]]) -> str:
    bert("BertForSequenceClassification", num_labels=num_labels).save_pretrained(path / "teacher")
    bert_tokenizer().save_pretrained(path / "teacher")
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "output": str(path / "cache"),
        "task": "ranking",
        "teacher": {"model": str(path / "teacher"), "device": "cpu"},
        "corpus": {"paths": [str(path / "corpus.jsonl")]},
        "sequences": {"max_length": 32},
    }
    dump_teacher(build(DumpConfig, config), progress=False)
    return str(path / "cache")


def test_a_teacher_with_two_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"has 2 outputs.*task ranking needs.*--task sequence-classification"):
        dump(tmp_path, 2, [{"query": QUERY, "documents": DOCUMENTS}])


def test_scores_and_relevance_come_back_document_by_document(tmp_path: Path) -> None:
    rows = [
        {"query": QUERY, "documents": DOCUMENTS, "relevance": [0, 1, None]},
        {"query": "a big dog", "documents": ["", "the dog"], "relevance": None},
    ]
    cache = open_cache(dump(tmp_path, 1, rows))
    batch = cache.read([1, 0], fields=(OUTPUTS_FIELD,))
    np.testing.assert_array_equal(batch.labels_P, [np.nan, np.nan, 0, 1, np.nan])
    model = bert("BertForSequenceClassification", num_labels=1).eval()
    expected = []
    for row in (rows[1], rows[0]):
        for text in row["documents"]:
            # In lists, because alone an empty second text is taken for none.
            inputs = bert_tokenizer()([row["query"]], [text], return_tensors="pt", return_token_type_ids=True)
            expected.append(model(**inputs).logits.item())
    np.testing.assert_allclose(batch.hidden[OUTPUTS_FIELD][:, 0], expected, rtol=1e-5, atol=1e-6)
    collated = TASK.collate(batch, pad_id=0)
    assert collated["groups"].tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(collated["label_values"], batch.labels_P)
