"""Sequences that a task builds document by document, in flat arrays (tokens on disk), accessible by number.

For tasks whose sequences are not cut from one stream of tokens: a text with its label, a pair, a query with its
documents, a text with masked tokens. A task yields `BuiltSequence` objects in the order of the documents; this module
stores them, and writes the tables of their origin.
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

#: A document of the corpus: its main text, and the other columns that the task reads, by role.
Document = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class BuiltSequence:
    """One sequence of a document. ``num_rows`` is its number of positions if it has no array of labels or indices."""

    tokens_T: NDArray[np.uint32]
    segment_ids_T: NDArray[np.uint16] | None = None
    labels_L: NDArray[Any] | None = None
    token_index_L: NDArray[np.uint32] | None = None
    num_rows: int = 1
    token_offset: int = 0
    """Offset of the first token in the document, if a document becomes several sequences."""
    suffix: str = ""
    """Appended to the id of the sequence, for several sequences of one piece of text."""
    is_truncated: bool = False

    def __post_init__(self) -> None:
        rows = [len(array) for array in (self.labels_L, self.token_index_L) if array is not None]
        if len(set(rows)) > 1:  # all positions after it would be misaligned
            raise ValueError(f"a sequence must have as many labels as token indices, found {rows[0]} and {rows[1]}")

    @property
    def num_positions(self) -> int:
        """Number of positions."""
        arrays = [array for array in (self.labels_L, self.token_index_L) if array is not None]
        return len(arrays[0]) if arrays else self.num_rows


class DocumentSequences:
    """All sequences of a corpus, by number; the result of `build_sequences`."""

    def __init__(
        self, corpus: Corpus, config: Any, buffer: _SequenceBuffer, num_empty: int, num_too_short: int
    ) -> None:
        self.config = config
        self.num_documents = len(corpus)
        self.num_empty = num_empty
        self.num_too_short = num_too_short
        self.num_truncated = buffer.num_truncated
        self.lengths_N = np.array(buffer.num_positions, np.int64)
        self._corpus, self._tokens = corpus, buffer.tokens
        self._document_N = np.array(buffer.documents, np.int64)
        self._token_offset_N = np.array(buffer.token_offsets, np.int64)
        self._suffixes = buffer.suffixes
        self._num_tokens_N = np.array(buffer.num_tokens, np.int64)
        self._tokens_at = np.concatenate([[0], np.cumsum(self._num_tokens_N)])
        self._rows_at = np.concatenate([[0], np.cumsum(self.lengths_N)])
        self._segments, self._labels, self._token_index = (
            np.concatenate(parts) if parts else None for parts in (buffer.segments, buffer.labels, buffer.token_index)
        )

    @property
    def num_sequences(self) -> int:
        """Number of sequences, N."""
        return len(self.lengths_N)

    @property
    def longest(self) -> int:
        """Most tokens of one model input; a sequence may have several texts, each within ``max_length``."""
        most = max(self.config.max_length, getattr(self.config, "max_target_length", 0))
        return min(most, int(self._num_tokens_N.max()))

    @property
    def num_positions(self) -> int:
        """Positions of all sequences."""
        return int(self.lengths_N.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._num_tokens_N.sum())

    def sequence(self, index: int) -> Sequence:
        """Return sequence ``index``; raises ``IndexError`` if it does not exist."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} does not exist; there are 0 to {self.num_sequences - 1}")
        tokens, rows = (slice(at[index], at[index + 1]) for at in (self._tokens_at, self._rows_at))

        def part(array: NDArray[Any] | None, span: slice) -> Any:
            return None if array is None else array[span]

        return Sequence(
            index,
            np.array(self._tokens[tokens]),
            np.ones(int(self.lengths_N[index]), np.uint8),
            part(self._segments, tokens),
            part(self._labels, rows),
            part(self._token_index, rows),
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
        bounds = zip(self._tokens_at[rows], self._tokens_at[1:][rows], strict=False)  # the first has one more
        hashes = [token_hash(self._tokens[first:last]) for first, last in bounds]
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


class _SequenceBuffer:
    """The sequences built so far: tokens in a file, everything else in memory."""

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
        self.token_index: list[NDArray[np.uint32]] = []
        self.num_truncated = 0

    def add(self, document: int, built: BuiltSequence) -> None:
        self._spool.append([built.tokens_T])
        self.num_tokens.append(len(built.tokens_T))
        self.num_positions.append(built.num_positions)
        self.documents.append(document)
        self.token_offsets.append(built.token_offset)
        self.suffixes.append(built.suffix)
        for parts, array in ((self.segments, built.segment_ids_T), (self.labels, built.labels_L)):
            if array is not None:
                parts.append(array)
        if built.token_index_L is not None:
            self.token_index.append(built.token_index_L)
        self.num_truncated += built.is_truncated


def build_sequences(
    corpus: Corpus,
    config: Any,
    build: Callable[[int, list[Document]], Iterator[list[BuiltSequence]]],
    progress: Progress | None = None,
) -> DocumentSequences:
    """Build the sequences of all documents of ``corpus``.

    ``build(start, documents)`` yields the sequences of each document of a batch whose first has number ``start``; none
    for a document that is empty or too short. Raises ``CorpusError`` if there are no sequences at all.
    """
    with TokenSpool() as spool:
        buffer = _SequenceBuffer(spool)
        num_empty = num_too_short = 0
        for start, documents in corpus.iter_rows(_BATCH_DOCUMENTS):
            for number, (document, built) in enumerate(zip(documents, build(start, documents), strict=True)):
                num_empty += not built and not document[0]
                num_too_short += not built and bool(document[0])
                for sequence in built:
                    buffer.add(start + number, sequence)
            if progress is not None:
                progress(start + len(documents), len(corpus))
        buffer.tokens = spool.finish()
    if not buffer.documents:
        raise CorpusError(
            f"no document of {', '.join(corpus.sources)} can be used: {num_empty} are empty and {num_too_short} too "
            "short for the task; choose other documents or columns"
        )
    return DocumentSequences(corpus, config, buffer, num_empty, num_too_short)


def joined(parts: list[list[int]], around: list[list[int]]) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Return ``parts`` joined with the special tokens ``around`` them, and the part of every token, from 0.

    Special tokens belong to the part before them, those at the beginning to the first part.
    """
    ids, segments = list(around[0]), [0] * len(around[0])
    for number, (part, after) in enumerate(zip(parts, around[1:], strict=True)):
        ids += [*part, *after]
        segments += [number] * (len(part) + len(after))
    return np.array(ids, np.uint32), np.array(segments, np.uint16)


def shorten(parts: list[list[int]], room: int) -> list[list[int]]:
    """Return one or two ``parts`` truncated to ``room`` tokens in total, at their ends, the longer first.

    If both are too long, each gets half of the room, and the longer (of equal ones the second) an odd token, as
    tokenizers do with ``truncation="longest_first"``.
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
    """Return the number of special tokens around the parts."""
    return sum(map(len, around))


def texts_of(encoder: Encoder, texts: list[Any], prefix: str = "") -> list[list[int]]:
    """Return the token ids of every text, after ``prefix``, without special tokens; none for a blank or missing text.

    Raises ``CorpusError`` for values that are not texts.
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
