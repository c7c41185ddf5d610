"""Which sequences a student was trained on, kept next to it, so that an evaluation can tell what is held out.

The fingerprints of corpora do not tell: `kdcache transcode --where` makes two caches with nothing in common from one
corpus, and two corpora may share texts. So a run keeps a 64-bit hash of the tokens of every sequence that it may draw,
and of the id of every document they came from. Sequences are compared by their tokens; where both caches are of one
corpus that was cut into sequences differently, by their documents.

The file takes 8 bytes per sequence and per document. Of more than `MOST_HASHES` the smallest are kept, a random sample
on which the number of common sequences is estimated. It is not needed for anything else: without it, as in runs of
older versions, an evaluation compares the fingerprints.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.students.run_file import read_run

TRAINED_ON_FILE = "kdcache_trained_on.npz"
#: Hashes of sequences, and as many of documents, that are kept: 16 MB each.
MOST_HASHES = 1 << 21

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """How many of ``num_sequences`` a student was trained on, compared by ``by``."""

    num_trained: int
    num_sequences: int
    by: Literal["sequences", "documents"]
    is_estimate: bool = False


def write_trained_on(output: str | Path, cache: Cache, sequences_N: NDArray[np.int64] | None) -> None:
    """Write the hashes of the sequences (None: all) of ``cache`` that a run in ``output`` draws from.

    Nothing is written for a cache whose per-sequence table does not have what they are made of.
    """
    if not _has_columns(cache):
        return
    chosen_N = np.arange(len(cache)) if sequences_N is None else sequences_N
    hashes = _sequence_hashes(cache, chosen_N), _document_hashes(cache, chosen_N)[1]
    path = Path(output) / TRAINED_ON_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.npz")
    sequences_M, documents_M = (np.unique(values)[:MOST_HASHES] for values in hashes)
    np.savez(temporary, sequences=sequences_M, documents=documents_M, most=MOST_HASHES)
    os.replace(temporary, path)


def overlap(student: str, cache: Cache, sequences_N: NDArray[np.int64]) -> Overlap | None:
    """Return how many of the sequences of ``cache`` the student was trained on; None where its run does not tell."""
    record = (read_run(student) or {}).get("cache", {})
    same_corpus = record.get("corpus") == cache.manifest.corpus.fingerprint
    cut = record.get("sequences")
    if (same_corpus and cut is None) or not _has_columns(cache):
        return None
    by: Literal["sequences", "documents"] = "documents" if same_corpus and cut != cut_of(cache) else "sequences"
    read = _read(student, by)
    if read is None:
        return None
    known, is_sampled = read
    if by == "sequences":
        owner_M, hashes_M = np.arange(len(sequences_N)), _sequence_hashes(cache, sequences_N)
    else:
        owner_M, hashes_M = _document_hashes(cache, sequences_N)
    if is_sampled:  # of what is above the largest kept hash nothing is known
        is_known_M = hashes_M <= known[-1]
        owner_M, hashes_M = owner_M[is_known_M], hashes_M[is_known_M]
    judged, trained = np.unique(owner_M), np.unique(owner_M[np.isin(hashes_M, known)])
    if is_sampled and not len(judged):
        return None
    share = len(trained) / max(len(judged), 1)
    return Overlap(round(share * len(sequences_N)), len(sequences_N), by, is_sampled)


def cut_of(cache: Cache) -> dict[str, Any]:
    """Return what decides how the documents of a corpus become sequences."""
    return {"task": cache.manifest.task, **cache.manifest.sequences}


def _has_columns(cache: Cache) -> bool:
    return {"token_hash", "document_id"} <= set(cache.sequences.column_names)


def _read(student: str, name: str) -> tuple[Hashes, bool] | None:
    """Return the kept hashes, ascending, and whether they are a sample; None where there are none to be read."""
    try:
        with np.load(Path(student) / TRAINED_ON_FILE, allow_pickle=False) as file:
            found, most = file[name], int(file["most"])
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    is_sorted = found.ndim == 1 and found.dtype == np.uint64 and bool((found[1:] > found[:-1]).all())
    return (found, 0 < most <= len(found)) if is_sorted else None


def _sequence_hashes(cache: Cache, sequences_N: NDArray[np.int64]) -> Hashes:
    """Return the hash of each of the sequences, [N]."""
    return _hashes(cache.sequences["token_hash"].take(sequences_N).to_pylist())


def _document_hashes(cache: Cache, sequences_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], Hashes]:
    """Return the hashes of the documents that the sequences hold parts of, and for each the number of its sequence."""
    if not cache.manifest.is_packed:
        return np.arange(len(sequences_N)), _hashes(cache.sequences["document_id"].take(sequences_N).to_pylist())
    # The per-sequence table names only the first document of a window.
    pieces = cache.plan_table().select(["sequence", "document_id"])
    pieces = pieces.filter(pc.is_in(pieces["sequence"], value_set=pa.array(sequences_N).cast(pieces["sequence"].type)))
    owner_M = np.searchsorted(sequences_N, np.asarray(pieces["sequence"]))
    return owner_M, _hashes(pieces["document_id"].to_pylist())


def _hashes(texts: Iterable[Any]) -> Hashes:
    digests = b"".join(hashlib.blake2b(str(text).encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
