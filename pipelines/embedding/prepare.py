"""Prepare texts for embeddings: STS-B pairs with their scores, and SciFact titles, abstracts and claims.

    python pipelines/embedding/prepare.py OUTPUT_DIR --data FOLDER

``FOLDER`` holds stsb_en/train.csv and test.csv (sentence, sentence, score from 0 to 5) and scifact/scifact.zip (with
corpus_train.csv: doc_id, title, abstract), scifact/queries.tsv (split, id, claim) and scifact/qrels.tsv (split, id,
doc_id, relevance). Written are:

- train.jsonl: STS-B's training pairs with their score as ``label``; pairs of a title and the beginning of its abstract;
  the training claims as single texts. Shuffled with a fixed seed, so that its first rows are a sample of all;
- sts_test.jsonl: STS-B's test pairs;
- queries.jsonl, corpus.jsonl, qrels.tsv: the claims of the validation split (SciFact keeps its test labels to itself),
  every title with its abstract, and what is relevant, in BEIR's form.

Titles and abstracts of the searched documents are trained on, with no word of which belong to which claim: who builds a
search has the documents, too.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import random
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: The beginning of an abstract that is paired with its title: more is cut off in training anyway.
BEGINNING_CHARACTERS = 400


def read_sts(path: Path) -> list[dict[str, Any]]:
    """Return the pairs of a split with their scores."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{"text": a, "text_pair": b, "label": float(score)} for a, b, score in csv.reader(file)]


def read_abstracts(archive: Path) -> list[tuple[str, str, str]]:
    """Return id, title and abstract of every document; an abstract is stored as the repr of an array of sentences."""
    with zipfile.ZipFile(archive) as files, files.open("corpus_train.csv") as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")))
    return [(row["doc_id"], row["title"], " ".join(sentences(row["abstract"]))) for row in rows]


def sentences(text: str) -> list[str]:
    """Return the sentences of an abstract; between them there may be a line break instead of a comma."""
    return [ast.literal_eval(item) for item in re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", text)]


def read_table(path: Path, split: str) -> list[list[str]]:
    """Return the rows of a split of a file of tab-separated values, without their first column."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[1:] for row in rows if row[0] == split]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines and say how many."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where the files are written")
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb_en and scifact")
    parser.add_argument("--queries", type=int, help="use only the first claims of the validation split")
    parser.add_argument("--documents", type=int, help="search only so many abstracts, and what belongs to the claims")
    arguments = parser.parse_args()
    output, scifact = arguments.output, arguments.data / "scifact"
    output.mkdir(parents=True, exist_ok=True)
    abstracts = read_abstracts(scifact / "scifact.zip")
    qrels = [(query, document) for query, document, _ in read_table(scifact / "qrels.tsv", "validation")]
    judged = set(list(dict.fromkeys(query for query, _ in qrels))[: arguments.queries])
    qrels = [(query, document) for query, document in qrels if query in judged]
    train = read_sts(arguments.data / "stsb_en" / "train.csv")
    train += [{"text": title, "text_pair": abstract[:BEGINNING_CHARACTERS]} for _, title, abstract in abstracts]
    train += [{"text": claim} for _, claim in read_table(scifact / "queries.tsv", "train")]
    random.Random(0).shuffle(train)
    write(output / "train.jsonl", train)
    write(output / "sts_test.jsonl", read_sts(arguments.data / "stsb_en" / "test.csv"))
    claims = [row for row in read_table(scifact / "queries.tsv", "validation") if row[0] in judged]
    write(output / "queries.jsonl", ({"_id": query, "text": claim} for query, claim in claims))
    relevant, first = {document for _, document in qrels}, {name for name, *_ in abstracts[: arguments.documents]}
    searched = [row for row in abstracts if row[0] in relevant | first]
    write(output / "corpus.jsonl", ({"_id": name, "text": f"{title} {text}"} for name, title, text in searched))
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t1" for query, document in qrels)]
    (output / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
