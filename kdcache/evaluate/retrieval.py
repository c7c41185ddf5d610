"""Evaluate embeddings by search: queries and documents in one cache, and a file (qrels) that says which are relevant.

Every document of the cache is ranked for every judged query by the cosine of their embeddings: the teacher's from the
cache, a student's own. The numbers are therefore those of searching the whole corpus, comparable with published ones
for the same queries and documents. No document is excluded because its id is a query's, unlike in some published
numbers (ArguAna's, whose queries are documents).

The qrels name ids, and the ids of queries and of documents may overlap (they do in BEIR). Queries and documents are
therefore told apart by the corpus file that they came from: a file holds queries if more of its ids are judged queries
than judged documents. Everything in such files is a query; everything else is searched.

Shape suffixes: N sequences, Q judged queries, M documents, D width.
"""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.errors import ConfigError, did_you_mean
from kdcache.evaluate.measures import Answers, Metrics
from kdcache.evaluate.metrics import dcg, reciprocal_rank
from kdcache.words import are, count

log = logging.getLogger(__name__)

#: Relevance of documents by their ids, by the id of the query.
Qrels = dict[str, dict[str, float]]

_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Retrieval:
    """Which sequences of a cache are judged queries and which are searched, and what is relevant to each query.

    ``relevance_Q`` maps indices among the documents to grades above 0.
    """

    queries_Q: NDArray[np.int64]
    documents_M: NDArray[np.int64]
    relevance_Q: list[dict[int, float]]
    missing_Q: list[list[float]]
    """Grades of the relevant documents that the cache does not hold, which count as not found."""

    def measure(self, answers: Answers) -> Metrics:
        """Return nDCG@10, recall@10, recall@100 and MRR@10, the means over the queries."""
        unit_ND = _unit(answers.outputs_PC)
        documents_MD = unit_ND[self.documents_M]
        rows = []
        block = max(1, _SCORES_AT_ONCE // max(len(documents_MD), 1))
        for start in range(0, len(self.queries_Q), block):
            scores_QM = unit_ND[self.queries_Q[start : start + block]] @ documents_MD.T
            rows += [self._of_query(start + n, scores_M) for n, scores_M in enumerate(scores_QM)]
        names = ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10")
        return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))

    def _of_query(self, query: int, scores_M: NDArray[np.float32]) -> tuple[float, float, float, float]:
        relevance = self.relevance_Q[query]
        gains = [relevance.get(int(index), 0.0) for index in best(scores_M, 100)]
        every = [*relevance.values(), *self.missing_Q[query]]
        ideal = dcg(sorted(every, reverse=True)[:10])
        found_10, found_100 = (sum(gain > 0 for gain in gains[:cut]) / len(every) for cut in (10, 100))
        return dcg(gains[:10]) / ideal, found_10, found_100, reciprocal_rank(gains[:10])


def best(scores_M: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Return the indices of the ``count`` highest scores, highest first; of equal ones the earlier first."""
    indices = np.arange(len(scores_M))
    if count < len(scores_M):
        least = np.partition(scores_M, len(scores_M) - count)[len(scores_M) - count]
        indices = np.flatnonzero(scores_M >= least)
    return indices[np.argsort(-scores_M[indices], kind="stable")][:count]


def _unit(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.maximum(norms_N1, np.float32(1e-12))


def load_retrieval(cache: Cache, qrels_path: str, id_column: str | None = None) -> Retrieval:
    """Match the judgements of ``qrels_path`` with the sequences of ``cache``.

    ``id_column`` is the column of the corpus that holds the ids (default: the ids that kdcache gave the documents, such
    as ``queries.jsonl:3``). Raises ``ConfigError`` for a file or column that cannot be read, for queries that are not
    in the cache, ids that are not unique, and sequences of more than one text. Judged documents that are not in the
    cache count as not found, and a warning tells how many.
    """
    qrels = read_qrels(qrels_path)
    if cache.manifest.num_positions != cache.manifest.num_sequences:
        raise ConfigError("qrels need a cache of single texts, and this one has pairs; dump without text_pair")
    ids, sources = _ids(cache, id_column)
    judged_documents = {document for graded in qrels.values() for document in graded}
    of_queries = _query_sources(ids, sources, set(qrels), judged_documents)
    if len(of_queries) in (0, len(set(sources))):  # queries and documents in the same files
        is_query = np.array([name in qrels for name in ids])
    else:
        is_query = np.array([source in of_queries for source in sources])
    documents_M = np.flatnonzero(~is_query)
    queries = _judged(ids, np.flatnonzero(is_query), set(qrels))
    documents = _judged(ids, documents_M, judged_documents)
    _check_found(qrels, set(queries), judged_documents, set(documents), qrels_path, id_column)
    query_indices, document_indices = _unique(queries, "queries"), _unique(documents, "documents")
    return _matched(qrels, query_indices, documents_M, document_indices)


def _matched(
    qrels: Qrels, query_indices: Mapping[str, int], documents_M: NDArray[np.int64], document_indices: Mapping[str, int]
) -> Retrieval:
    index_of = {int(sequence): index for index, sequence in enumerate(documents_M)}
    queries, relevance_Q, missing_Q = [], [], []
    for query, graded in qrels.items():
        queries.append(query_indices[query])
        known = {name: grade for name, grade in graded.items() if name in document_indices}
        relevance_Q.append({index_of[document_indices[name]]: grade for name, grade in known.items()})
        missing_Q.append([grade for name, grade in graded.items() if name not in known])
    return Retrieval(np.array(queries, np.int64), documents_M, relevance_Q, missing_Q)


def read_qrels(path: str) -> Qrels:
    """Return the relevant documents of every query that has any, with their grades above 0.

    A line is ``query document grade`` with tabs between (BEIR, with or without its header), or ``query 0 document
    grade`` (TREC). Raises ``ConfigError`` for anything else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read judgements {path}: {error}") from None
    qrels: Qrels = {}
    for number, line in enumerate(lines, 1):
        parts = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or (number == 1 and not _is_number(parts[-1])):
            continue  # a header
        if len(parts) not in (3, 4) or not _is_number(parts[-1]):
            raise ConfigError(
                f"{path}, line {number}: expected 'query document grade' with tabs between, or TREC's 'query 0 "
                f"document grade', found {line[:80]!r}"
            )
        if float(parts[-1]) > 0:
            qrels.setdefault(parts[0].strip(), {})[parts[-2].strip()] = float(parts[-1])
    if not qrels:
        raise ConfigError(f"{path} names no relevant document (grade above 0)")
    return qrels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _ids(cache: Cache, column: str | None) -> tuple[list[str], list[str]]:
    """Return the id of every sequence, and the corpus file that it came from."""
    table = cache.sequences
    if column is not None and column not in table.column_names:
        raise ConfigError(f"id_column: the cache has no column {column!r}; {did_you_mean(column, table.column_names)}")
    document_ids = table["document_id"].to_pylist()
    ids = document_ids if column is None else [str(value) for value in table[column].to_pylist()]
    return ids, [_source(document_id) for document_id in document_ids]


def _source(document_id: str) -> str:
    """Return the file of a document; of a file that is one document, its folder."""
    file, _, row = document_id.rpartition(":")
    return file if row.isdecimal() and file else posixpath.dirname(document_id)


def _query_sources(
    ids: Sequence[str], sources: Sequence[str], queries: Iterable[str], documents: Iterable[str]
) -> set[str]:
    queries, documents = set(queries), set(documents)
    of_queries, of_documents = Counter[str](), Counter[str]()
    for name, source in zip(ids, sources, strict=True):
        of_queries[source] += name in queries
        of_documents[source] += name in documents
    return {source for source in of_queries if of_queries[source] > of_documents[source]}


def _judged(ids: Sequence[str], sequences: NDArray[np.int64], judged: set[str]) -> dict[str, list[int]]:
    """Return the sequences of each judged id."""
    found: dict[str, list[int]] = {}
    for sequence in sequences.tolist():
        if ids[sequence] in judged:
            found.setdefault(ids[sequence], []).append(sequence)
    return found


def _unique(found: Mapping[str, list[int]], what: str) -> dict[str, int]:
    twice = next((name for name, sequences in found.items() if len(sequences) > 1), None)
    if twice is not None:
        raise ConfigError(f"several {what} of the cache have the id {twice!r}; make the ids of judged texts unique")
    return {name: sequences[0] for name, sequences in found.items()}


def _check_found(
    qrels: Qrels, queries: set[str], judged_documents: set[str], documents: set[str], path: str, column: str | None
) -> None:
    where = f"by their column {column}" if column else "by document_id (--id-column names another column)"
    lost = sorted(set(qrels) - queries)
    if lost:
        raise ConfigError(
            f"{count(len(lost), 'query', of=len(qrels))} of {path} {are(len(lost))} not in the cache, such as "
            f"{lost[0]!r}; they are matched {where}"
        )
    missing = sorted(judged_documents - documents)
    if len(missing) == len(judged_documents):
        raise ConfigError(f"no document of {path} is in the cache, such as {missing[0]!r}; they are matched {where}")
    if missing:
        log.warning(
            "%d of %d judged documents of %s are not in the cache and count as not found",
            len(missing),
            len(judged_documents),
            path,
        )
