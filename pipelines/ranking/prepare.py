"""Prepare claims with candidate abstracts for ranking: SciFact, candidates by BM25.

    python pipelines/ranking/prepare.py OUTPUT_DIR --data FOLDER

``FOLDER`` holds scifact.zip (with corpus_train.csv: doc_id, title, abstract), queries.tsv (split, id, claim) and
qrels.tsv (split, id, doc_id, relevance). One row is one claim with its list of documents:

- train.jsonl: the relevant documents of a training claim and 15 others, drawn from BM25's first 50 with a fixed seed;
- test.jsonl: BM25's first 20 for a claim of the validation split (SciFact keeps its test labels to itself), in BM25's
  order. A relevant document that BM25 did not find is not added: a reranker cannot save such a claim, and its score
  says so. The claims stay in, and BM25's own score is printed as what is to beat.

Fields: ``query_id``, ``query``, ``document_ids``, ``documents``, ``relevance`` (1 or 0 for each document).
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import random
import re
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

NEGATIVES, NEGATIVES_FROM, CANDIDATES = 15, 50, 20


class BM25:
    """Rank documents by the words that they share with a query (Robertson and Zaragoza 2009, k1 = 0.9, b = 0.4)."""

    def __init__(self, documents: list[str], k1: float = 0.9, b: float = 0.4) -> None:
        counts = [Counter(words(document)) for document in documents]
        lengths_N = np.array([sum(count.values()) for count in counts], np.float64)
        norms_N = k1 * (1 - b + b * lengths_N / lengths_N.mean())
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for index, count in enumerate(counts):
            for word, times in count.items():
                found[word].append((index, times))
        self.num_documents = len(documents)
        self.postings = {}
        for word, entries in found.items():
            documents_P, times_P = np.array(entries).T
            idf = np.log(1 + (len(documents) - len(entries) + 0.5) / (len(entries) + 0.5))
            self.postings[word] = documents_P, idf * times_P * (k1 + 1) / (times_P + norms_N[documents_P])

    def top(self, query: str, k: int) -> list[int]:
        """Return the indices of the ``k`` best documents, best first; of equal ones the earlier comes first."""
        scores_N = np.zeros(self.num_documents)
        for word in words(query):
            if word in self.postings:
                documents_P, scores_P = self.postings[word]
                scores_N[documents_P] += scores_P
        return np.argsort(-scores_N, kind="stable")[:k].tolist()


def words(text: str) -> list[str]:
    """Return the words of a text, lower-cased, without a plural s."""
    return [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in re.findall(r"\w+", text.lower())]


def read_corpus(archive: Path) -> dict[str, str]:
    """Return title and abstract of every document by id; an abstract is stored as the repr of a list of sentences."""
    with zipfile.ZipFile(archive) as files, files.open("corpus_train.csv") as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")))
    return {row["doc_id"]: " ".join([row["title"], *sentences(row["abstract"])]) for row in rows}


def sentences(text: str) -> list[str]:
    """Return the sentences of an abstract; between them there may be a line break instead of a comma."""
    return [ast.literal_eval(item) for item in re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", text)]


def read_claims(folder: Path, split: str) -> list[tuple[str, str, set[str]]]:
    """Return id, claim and the ids of the relevant documents of every claim of ``split`` that has any."""
    relevant = defaultdict(set)
    for name, query_id, document_id, _ in table(folder / "qrels.tsv"):
        if name == split:
            relevant[query_id].add(document_id)
    claims = [(query_id, claim) for name, query_id, claim in table(folder / "queries.tsv") if name == split]
    return [(query_id, claim, relevant[query_id]) for query_id, claim in claims if query_id in relevant]


def table(path: Path) -> list[list[str]]:
    """Return the rows of a file of tab-separated values (without quoting)."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Write both files and print what BM25 alone reaches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where train.jsonl and test.jsonl are written")
    parser.add_argument("--data", type=Path, required=True, help="folder with scifact.zip, queries.tsv and qrels.tsv")
    parser.add_argument("--seed", type=int, default=0, help="samples the negatives of the training claims")
    arguments = parser.parse_args()
    corpus = read_corpus(arguments.data / "scifact.zip")
    ids, search, rng = list(corpus), BM25(list(corpus.values())), random.Random(arguments.seed)

    def row(query_id: str, claim: str, documents: list[str], relevant: set[str]) -> dict[str, Any]:
        return {
            "query_id": query_id,
            "query": claim,
            "document_ids": documents,
            "documents": [corpus[name] for name in documents],
            "relevance": [int(name in relevant) for name in documents],
        }

    train, test = [], []
    for query_id, claim, relevant in read_claims(arguments.data, "train"):
        others = [ids[i] for i in search.top(claim, NEGATIVES_FROM) if ids[i] not in relevant]
        documents = [*sorted(relevant), *rng.sample(others, NEGATIVES)]
        train.append(row(query_id, claim, rng.sample(documents, len(documents)), relevant))
    for query_id, claim, relevant in read_claims(arguments.data, "validation"):
        test.append(row(query_id, claim, [ids[i] for i in search.top(claim, CANDIDATES)], relevant))

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (arguments.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{arguments.output / name}.jsonl: {len(rows)} claims", file=sys.stderr)
    found = [any(row["relevance"]) for row in test]
    print(f"BM25: MRR@10 {np.mean([reciprocal_rank(row['relevance']) for row in test]):.4f}", file=sys.stderr)
    print(f"a relevant document is among the {CANDIDATES} candidates of {np.mean(found):.1%} claims", file=sys.stderr)


def reciprocal_rank(relevance: list[int]) -> float:
    """Return 1 / rank of the first relevant document among the first ten, or 0."""
    return next((1 / rank for rank, value in enumerate(relevance[:10], 1) if value > 0), 0.0)


if __name__ == "__main__":
    main()
