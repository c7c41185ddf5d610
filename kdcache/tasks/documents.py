"""Sequences that a task makes of documents one by one, kept in flat arrays (tokens on disk) and handed out by number.

For tasks whose sequences are not cut from one stream of tokens: a text with its label, a pair, a question with its
documents, a text with some tokens masked. A task yields `Made` sequences document by document, in order; this module
keeps them and writes the tables that say where each came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.corpus import Corpus, Encoder
from kdcache.corpus.sequences import Progress, with_metadata
from kdcache.corpus.spool import TokenSpool
from kdcache.errors import CorpusError
from kdcache.schema import Sequence, token_hash

_BATCH_DOCUMENTS = 256

#: A row of the corpus: its main text, and what else the task reads, by role.
Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Made:
    """One sequence of a document. ``num_rows`` is for tasks without labels and places, whose arrays tell it."""

    tokens_T: NDArray[np.uint32]
    segment_ids_T: NDArray[np.uint16] | None = None
    labels_L: NDArray[Any] | None = None
    token_index_L: NDArray[np.uint32] | None = None
    num_rows: int = 1
    token_offset: int = 0
    """Of the sequence's first token in its document, where a document becomes several sequences."""
    suffix: str = ""
    """What tells sequences of the same place apart, in their ids."""
    is_truncated: bool = False

    def __post_init__(self) -> None:
        rows = [len(array) for array in (self.labels_L, self.token_index_L) if array is not None]
        if len(set(rows)) > 1:  # all rows behind it would be wrong
            raise ValueError(f"a sequence has as many labels as places, found {rows[0]} and {rows[1]}")

    @property
    def num_positions(self) -> int:
        """Number of rows."""
        arrays = [array for array in (self.labels_L, self.token_index_L) if array is not None]
        return len(arrays[0]) if arrays else self.num_rows


class DocumentSequences:
    """All sequences of a corpus, by number; made by `make_sequences`."""

    def __init__(self, corpus: Corpus, config: Any, kept: _Kept, num_empty: int, num_too_short: int) -> None:
        self.config = config
        self.num_documents = len(corpus)
        self.num_empty = num_empty
        self.num_too_short = num_too_short
        self.num_truncated = kept.num_truncated
        self.lengths_N = np.array(kept.num_positions, np.int64)
        self._corpus, self._tokens = corpus, kept.tokens
        self._document_N = np.array(kept.documents, np.int64)
        self._token_offset_N = np.array(kept.token_offsets, np.int64)
        self._suffixes = kept.suffixes
        self._num_tokens_N = np.array(kept.num_tokens, np.int64)
        self._tokens_at = np.concatenate([[0], np.cumsum(self._num_tokens_N)])
        self._rows_at = np.concatenate([[0], np.cumsum(self.lengths_N)])
        self._segments, self._labels, self._places = (
            np.concatenate(parts) if parts else None for parts in (kept.segments, kept.labels, kept.places)
        )

    @property
    def num_sequences(self) -> int:
        """Number of sequences, N."""
        return len(self.lengths_N)

    @property
    def longest(self) -> int:
        """Most tokens that a model is fed at once: a sequence may be several texts, each within ``max_length``."""
        most = max(self.config.max_length, getattr(self.config, "max_target_length", 0))
        return min(most, int(self._num_tokens_N.max()))

    @property
    def num_positions(self) -> int:
        """Rows of all sequences."""
        return int(self.lengths_N.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._num_tokens_N.sum())

    def sequence(self, index: int) -> Sequence:
        """Return sequence ``index``; raises ``IndexError`` if there is none."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"there are sequences 0 to {self.num_sequences - 1}, not {index}")
        tokens, rows = (slice(at[index], at[index + 1]) for at in (self._tokens_at, self._rows_at))

        def part(array: NDArray[Any] | None, span: slice) -> Any:
            return None if array is None else array[span]

        return Sequence(
            index,
            np.array(self._tokens[tokens]),
            np.ones(int(self.lengths_N[index]), np.uint8),
            part(self._segments, tokens),
            part(self._labels, rows),
            part(self._places, rows),
        )

    def table(self) -> pa.Table:
        """Return one row per sequence: columns as those of ``SequencePlan.table``.

        ``num_tokens`` is that of the sequence, with special tokens.
        """
        document_ids = self._corpus.document_ids(self._document_N)
        return pa.table(
            {
                "sequence": np.arange(self.num_sequences),
                "sequence_id": self._sequence_ids(0, self.num_sequences, document_ids),
                "document": self._document_N,
                "document_id": pa.array(document_ids, pa.string()),
                "token_offset": self._token_offset_N,
                "num_tokens": self._num_tokens_N.astype(np.int32),
            }
        )

    def sequence_table(self, start: int, stop: int) -> pa.Table:
        """Return one row for each sequence from ``start`` to ``stop``: columns as ``SequencePlan.sequence_table``."""
        rows = slice(start, stop)
        document_ids = self._corpus.document_ids(self._document_N[rows])
        hashes = [token_hash(self._tokens[a:b]) for a, b in zip(self._tokens_at[rows], self._tokens_at[1:][rows])]  # noqa: B905
        columns: dict[str, Any] = {
            "sequence": np.arange(start, start + len(document_ids)),
            "sequence_id": self._sequence_ids(start, stop, document_ids),
            "document_id": pa.array(document_ids, pa.string()),
            "num_documents": np.ones(len(document_ids), np.int32),
            "token_offset": self._token_offset_N[rows],
            "num_tokens": self._num_tokens_N[rows].astype(np.int32),
            "num_positions": self.lengths_N[rows].astype(np.int32),
            "token_hash": pa.array(hashes, pa.string()),
        }
        return with_metadata(columns, self._corpus.metadata_table(self._document_N[rows]))

    def _sequence_ids(self, start: int, stop: int, document_ids: list[str]) -> pa.Array:
        offsets = self._token_offset_N[start:stop].tolist()
        named = zip(document_ids, offsets, self._suffixes[start:stop], strict=True)
        return pa.array([f"{document_id}@{offset}{suffix}" for document_id, offset, suffix in named], pa.string())


class _Kept:
    """What has been made so far: tokens in a file, everything else in memory."""

    def __init__(self, spool: TokenSpool) -> None:
        self._spool = spool
        self.tokens: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self.num_tokens: list[int] = []
        self.num_positions: list[int] = []
        self.documents: list[int] = []
        self.token_offsets: list[int] = []
        self.suffixes: list[str] = []
        self.segments: list[NDArray[np.uint16]] = []
        self.labels: list[NDArray[Any]] = []
        self.places: list[NDArray[np.uint32]] = []
        self.num_truncated = 0

    def add(self, document: int, made: Made) -> None:
        self._spool.append([made.tokens_T])
        self.num_tokens.append(len(made.tokens_T))
        self.num_positions.append(made.num_positions)
        self.documents.append(document)
        self.token_offsets.append(made.token_offset)
        self.suffixes.append(made.suffix)
        for parts, array in ((self.segments, made.segment_ids_T), (self.labels, made.labels_L)):
            if array is not None:
                parts.append(array)
        if made.token_index_L is not None:
            self.places.append(made.token_index_L)
        self.num_truncated += made.is_truncated


def make_sequences(
    corpus: Corpus,
    config: Any,
    make: Callable[[int, list[Row]], Iterator[list[Made]]],
    progress: Progress | None = None,
) -> DocumentSequences:
    """Make the sequences of all documents of ``corpus``.

    ``make(start, rows)`` yields, for each row of a batch whose first document is number ``start``, its sequences: none
    for a document that is empty or too short. Raises ``CorpusError`` if there is no sequence at all.
    """
    with TokenSpool() as spool:
        kept = _Kept(spool)
        num_empty = num_too_short = 0
        for start, rows in corpus.iter_rows(_BATCH_DOCUMENTS):
            for number, (row, made) in enumerate(zip(rows, make(start, rows), strict=True)):
                num_empty += not made and not row[0]
                num_too_short += not made and bool(row[0])
                for one in made:
                    kept.add(start + number, one)
            if progress is not None:
                progress(start + len(rows), len(corpus))
        kept.tokens = spool.finish()
    if not kept.documents:
        raise CorpusError(
            f"no document of {', '.join(corpus.sources)} can be used: {num_empty} are empty and {num_too_short} too "
            "short for the task"
        )
    return DocumentSequences(corpus, config, kept, num_empty, num_too_short)


def joined(parts: list[list[int]], around: list[list[int]]) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Return ``parts`` with the special tokens ``around`` them, and to which part every token belongs, from 0.

    Special tokens belong to the part before them, those at the beginning to the first.
    """
    ids, segments = list(around[0]), [0] * len(around[0])
    for number, (part, after) in enumerate(zip(parts, around[1:], strict=True)):
        ids += [*part, *after]
        segments += [number] * (len(part) + len(after))
    return np.array(ids, np.uint32), np.array(segments, np.uint16)


def shorten(parts: list[list[int]], room: int) -> list[list[int]]:
    """Return one or two ``parts`` cut to ``room`` tokens together: the longer loses first, from its end.

    Two that are both too long get half of the room each, and the longer (of equal ones the second) an odd token, which
    is what tokenizers do with ``truncation="longest_first"``.
    """
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = map(len, parts)
    if first + second <= room:
        return parts
    half = room - room // 2
    if first > second:
        limit = max(half, room - second)
        return [parts[0][:limit], parts[1][: room - limit]]
    limit = max(half, room - first)
    return [parts[0][: room - limit], parts[1][:limit]]


def special_tokens(around: list[list[int]]) -> int:
    """Return how many tokens stand around the parts."""
    return sum(map(len, around))


def texts_of(encoder: Encoder, texts: list[Any], prefix: str = "") -> list[list[int]]:
    """Return the token ids of every text without special tokens, ``prefix`` before it; none of a blank or missing one.

    Raises ``CorpusError`` for what is no text.
    """
    strange = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if strange is not None:
        raise CorpusError(
            f"expected texts, found {type(strange).__name__} {str(strange)[:40]!r} among them; choose another column "
            "with --column ROLE=NAME, or make it a text"
        )
    filled = [prefix + text for text in texts if text and text.strip()]
    encoded = iter(encoder.encode_plain(filled) if filled else [])
    return [next(encoded) if text and text.strip() else [] for text in texts]
