"""The recipes of the tasks, run as a user runs them, in their smoke size and with tiny models of the right shape.

Their commands are forked from one Python that has done the imports, ten for each recipe: see tests/preloaded.py.

What their students are worth is measured with real teachers (docs/retention.md); here it is that every step works.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.task_models import SENTENCES, bert, bert_tokenizer, t5, t5_tokenizer

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

_POSITIONS = {"max_position_embeddings": 256}
_CLASSES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


def write_models(path: Path, teacher: Any, student: Any = None, tokenizer: Any = None) -> dict[str, str]:
    """Write a teacher, and a student where it is a model of its own; return the recipe's variables."""
    models = {"TEACHER": teacher} | ({} if student is None else {"STUDENT": student})
    for name, model in models.items():
        model.save_pretrained(path / name)
        (tokenizer or bert_tokenizer()).save_pretrained(path / name)
    return {name: str(path / name) for name in models} | {"DATA": str(path)}


def write_rows(path: Path, make: Callable[[int, str], dict[str, Any]]) -> None:
    """Write training and test rows made of every sentence, several times."""
    rows = [json.dumps(make(n, SENTENCES[n % len(SENTENCES)])) + "\n" for n in range(40)]
    for split in ("train", "test"):
        (path / f"{split}.jsonl").write_text("".join(rows))


def classification(path: Path) -> dict[str, str]:
    write_rows(path, lambda n, text: {"text": text, "label": ["negative", "positive"][n % 2]})
    name = "BertForSequenceClassification"
    return write_models(path, bert(name, **_CLASSES, **_POSITIONS), bert("BertModel", width=8, **_POSITIONS))


def regression(path: Path) -> dict[str, str]:
    write_rows(path, lambda n, text: {"text": text, "text_pair": SENTENCES[n % 5], "label": n % 6})
    teacher = bert("BertForSequenceClassification", num_labels=1, **_POSITIONS)
    return {**write_models(path, teacher, bert("BertModel", width=8, **_POSITIONS)), "KIND": "stsb"}


def masked_lm(path: Path) -> dict[str, str]:
    write_rows(path, lambda n, text: {"text": text})
    return write_models(path, bert("BertForMaskedLM", num_layers=12, **_POSITIONS))


def seq2seq_lm(path: Path) -> dict[str, str]:
    write_rows(path, lambda n, text: {"abstract": text, "title": SENTENCES[n % 5]})
    tokenizer, teacher = t5_tokenizer(), t5(num_layers=8)
    tokenizer.add_tokens([f"<extra_id_{n}>" for n in range(20)])  # the recipe keeps more ids than there are words
    teacher.resize_token_embeddings(80)
    return write_models(path, teacher, tokenizer=tokenizer)


def ranking(path: Path) -> dict[str, str]:
    def row(n: int, text: str) -> dict[str, Any]:
        documents = [SENTENCES[(n + k) % len(SENTENCES)] for k in range(5)]
        ids = [str((n + k) % len(SENTENCES)) for k in range(5)]
        beside = {"document_ids": ids, "documents": documents, "relevance": [int(k == n % 3) for k in range(5)]}
        return {"query_id": str(n), "query": text, **beside}

    write_rows(path, row)
    teacher = bert("BertForSequenceClassification", num_labels=1, **_POSITIONS)
    return write_models(path, teacher, bert("BertModel", width=8, **_POSITIONS))


def embedding(path: Path) -> dict[str, str]:
    """Write files in the forms of STS-B and SciFact: see pipelines/embedding/prepare.py."""
    (path / "stsb_en").mkdir()
    for split in ("train", "test"):
        with (path / "stsb_en" / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows((text, SENTENCES[n % 5], n % 6) for n, text in enumerate(SENTENCES * 5))
    (path / "scifact").mkdir()
    abstracts = io.StringIO()
    table = csv.writer(abstracts)
    table.writerow(["doc_id", "title", "abstract"])
    table.writerows((100 + n, text, f"[{text!r}\n {SENTENCES[n - 1]!r}]") for n, text in enumerate(SENTENCES))
    with zipfile.ZipFile(path / "scifact" / "scifact.zip", "w") as archive:
        archive.writestr("corpus_train.csv", abstracts.getvalue())
    numbers = range(len(SENTENCES))
    lines = [f"{split}\t{n}\t{SENTENCES[n]}\n" for split in ("train", "validation") for n in numbers]
    (path / "scifact" / "queries.tsv").write_text("".join(lines))
    (path / "scifact" / "qrels.tsv").write_text("".join(f"validation\t{n}\t{100 + n}\t1\n" for n in numbers))
    return write_models(path, bert("BertModel", num_layers=6, **_POSITIONS))


#: By folder: what makes models and data, the two kinds of students, and the number that the table must have.
TASK_RECIPES = {
    "sequence_classification": ((classification, "top1 accuracy"), (regression, "spearman")),
    "masked_lm": ((masked_lm, "top1 accuracy"),),
    "seq2seq_lm": ((seq2seq_lm, "chrf"),),
    "embedding": ((embedding, "ndcg at 10"),),
    "ranking": ((ranking, "ndcg at 10"),),
}
CASES = [(name, *case) for name, cases in TASK_RECIPES.items() for case in cases]


@pytest.mark.parametrize(("name", "make", "number"), CASES, ids=[case[1].__name__ for case in CASES])
def test_recipe_ends_with_a_table_of_both_kinds_of_student(
    name: str, make: Callable[[Path], dict[str, str]], number: str, tmp_path: Path, preloaded: str
) -> None:
    variables = {**make(tmp_path), "SMOKE": "1", "OUTPUT": str(tmp_path / "output"), "PYTHON": preloaded}
    environment = {**os.environ, **variables, "HF_HUB_OFFLINE": "1"}
    command = ["bash", f"pipelines/{name}/run.sh"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = (tmp_path / "output" / "table.md").read_text()
    heading, _, *rows = table.splitlines()
    assert number in heading
    kinds = [row.split(" | ")[0].strip("| ") for row in rows]
    assert kinds[0] == "teacher"
    for kind in ("alone", "distilled"):
        assert any(kind in found for found in kinds), kinds
