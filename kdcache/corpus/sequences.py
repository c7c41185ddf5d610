"""Turn documents into sequences: tokenise once, decide where every sequence begins, return sequences by number.

Everything is planned before the teacher runs, so every shard is a known range of sequences. By default a sequence
belongs to one document, and long documents are cut without losing a target (see `kdcache.corpus.layout`). Packing fills
windows with many documents instead, and masks the positions that would predict the first token of another document. The
tokenizer is passed as an `Encoder`, so this layer imports neither transformers nor torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kdcache.config import Config
from kdcache.corpus.documents import Corpus
from kdcache.corpus.layout import Layout, ragged_layout, window_layout
from kdcache.corpus.spool import TokenSpool
from kdcache.errors import ConfigError, CorpusError
from kdcache.schema import STATISTICS_COLUMNS, Sequence, token_hash

_BATCH_DOCUMENTS = 256
_MAX_PACKED_LENGTH = 65_535  # segment ids are uint16

Progress = Callable[[int, int], None]


class SequenceConfig(Config):
    """How documents become sequences; ``max_length`` counts positions, that is model inputs per sequence."""

    max_length: int = Field(default=512, ge=2, le=2**24)
    packing: Literal["none", "window"] = "none"
    attend_across_documents: bool = False
    """In packed windows: let documents see the ones before them, and learn their first tokens too."""
    append_eos: bool = False
    """End every document with the EOS token, unless the tokenizer does so itself."""
    add_special_tokens: bool = True
    """Put the tokenizer's own special tokens around every document; false for texts that have them already."""

    @model_validator(mode="after")
    def _check_packing(self) -> SequenceConfig:
        if self.attend_across_documents and self.packing == "none":
            raise ValueError("attend_across_documents needs packing=window: without packing there is one document")
        if self.packing == "window" and self.max_length > _MAX_PACKED_LENGTH:
            raise ValueError(f"packing=window takes max_length up to {_MAX_PACKED_LENGTH}, found {self.max_length}")
        return self


class Encoder(Protocol):
    """A tokenizer: ``bos_id`` is set only if it really begins texts with that token."""

    @property
    def bos_id(self) -> int | None:
        """Token that ``encode`` puts before every text, or None."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Token that ends a text, or None."""
        ...

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of every text, with the tokenizer's own special tokens."""
        ...

    @property
    def num_ids(self) -> int:
        """Number of token ids, the true size of the vocabulary."""
        ...

    @property
    def mask_id(self) -> int | None:
        """The mask token, or None."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Special tokens: those that begin, end, separate, pad or mask texts, and the unknown token."""
        ...

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of every text, without special tokens."""
        ...

    def around(self, num_parts: int) -> list[list[int]]:
        """Return the special tokens before, between and after 1 or 2 texts that are fed together."""
        ...

    @property
    def treats_targets_alike(self) -> bool:
        """Whether target texts of a decoder are encoded like input texts of an encoder."""
        ...


class SequencePlan:
    """All sequences of a corpus, by number; made by `plan_sequences`.

    ``num_documents`` counts all documents of the corpus, of which ``num_empty`` (no text or no tokens) and
    ``num_too_short`` (a single token, so nothing to predict) appear in no sequence.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: SequenceConfig,
        layout: Layout,
        tokens: NDArray[np.uint32],
        document_D: NDArray[np.int64],
        bos_id: int | None,
        num_empty: int,
    ) -> None:
        self.config = config
        self.lengths_N = layout.lengths_N
        self.num_documents = len(corpus)
        self.num_empty = num_empty
        self.num_too_short = len(corpus) - num_empty - len(document_D)
        self.num_truncated = 0  # long documents become several sequences
        self._corpus, self._layout, self._tokens, self._document_D = corpus, layout, tokens, document_D
        self._prefix = np.array([] if bos_id is None else [bos_id], np.uint32)

    @property
    def num_sequences(self) -> int:
        """Number of sequences, N."""
        return len(self.lengths_N)

    @property
    def longest(self) -> int:
        """Most tokens that a model is fed at once; it is not fed the last token of a sequence."""
        return int(self.lengths_N.max())

    @property
    def num_positions(self) -> int:
        """Number of positions of all sequences, including masked ones."""
        return int(self.lengths_N.sum())

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences, positions + sequences: shared border tokens and BOS count in each."""
        return self.num_positions + self.num_sequences

    def sequence(self, index: int) -> Sequence:
        """Return sequence ``index``; raises ``IndexError`` if there is none."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"there are sequences 0 to {self.num_sequences - 1}, not {index}")
        mask_L = np.ones(self.lengths_N[index], np.uint8)
        if self._layout.has_prefix_N[index]:
            mask_L[0] = 0  # the sequence before has this target already
        segments_T = None
        if self.config.packing == "window" and not self.config.attend_across_documents:
            counts = self._layout.pieces(index, index + 1)[3]
            segments_T = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
            mask_L[np.diff(segments_T) != 0] = 0
        return Sequence(index, self._tokens_of(index), mask_L, segments_T)

    def table(self) -> pa.Table:
        """Return one row per piece of a document in a sequence, in order.

        Columns: ``sequence``, ``sequence_id``, ``document`` (index in the corpus), ``document_id``, ``token_offset``
        (of the piece's first token in its document), ``num_tokens`` (of the document, without BOS prefix).
        """
        sequence, kept, offset, num_tokens = self._layout.pieces(0, self.num_sequences)
        documents = self._document_D[kept]
        document_ids = self._corpus.document_ids(documents)
        return pa.table(
            {
                "sequence": sequence,
                "sequence_id": self._sequence_ids(sequence, document_ids, offset),
                "document": documents,
                "document_id": pa.array(document_ids, pa.string()),
                "token_offset": offset,
                "num_tokens": num_tokens.astype(np.int32),
            }
        )

    def sequence_table(self, start: int, stop: int) -> pa.Table:
        """Return one row for each sequence from ``start`` to ``stop``.

        Columns: ``sequence``, ``sequence_id``, ``document_id`` (the first one of a window), ``num_documents``,
        ``token_offset`` (in that document), ``num_tokens`` (of the sequence, BOS prefix included),
        ``num_positions``, ``token_hash`` (see `token_hash`), then the metadata of the (first) document. A metadata
        column with one of these names, or of `STATISTICS_COLUMNS`, gets ``corpus_`` before it.
        """
        layout, rows = self._layout, slice(start, stop)
        first_N = layout.first_N[rows]
        sequence = np.arange(start, start + len(first_N))
        document_ids = self._corpus.document_ids(self._document_D[first_N])
        offset = layout.starts_N[rows] - layout.offsets_D1[first_N]
        columns: dict[str, Any] = {
            "sequence": sequence,
            "sequence_id": self._sequence_ids(sequence, document_ids, offset),
            "document_id": pa.array(document_ids, pa.string()),
            "num_documents": (layout.last_N[rows] - first_N + 1).astype(np.int32),
            "token_offset": offset,
            "num_tokens": (self.lengths_N[rows] + 1).astype(np.int32),
            "num_positions": self.lengths_N[rows].astype(np.int32),
            "token_hash": pa.array([token_hash(self._tokens_of(index)) for index in sequence.tolist()], pa.string()),
        }
        return with_metadata(columns, self._corpus.metadata_table(self._document_D[first_N]))

    def _sequence_ids(
        self, sequence: NDArray[np.int64], document_ids: list[str], offset: NDArray[np.int64]
    ) -> pa.Array:
        if self.config.packing == "window":
            return pa.array([f"window:{index}" for index in sequence.tolist()], pa.string())
        pairs = zip(document_ids, offset.tolist(), strict=True)
        return pa.array([f"{document_id}@{first}" for document_id, first in pairs], pa.string())

    def _tokens_of(self, index: int) -> NDArray[np.uint32]:
        tokens_T = self._tokens[self._layout.starts_N[index] : self._layout.stops_N[index]]
        prefix = self._prefix if self._layout.has_prefix_N[index] else self._prefix[:0]
        return np.concatenate([prefix, tokens_T])


def plan_sequences(
    corpus: Corpus, encoder: Encoder, config: SequenceConfig, *, progress: Progress | None = None
) -> SequencePlan:
    """Tokenise a corpus and cut it into sequences.

    ``progress`` is called with the number of documents done and in total. Raises ``CorpusError`` if no document has
    two tokens, ``ConfigError`` if EOS is to be appended and the tokenizer has none.
    """
    if config.append_eos and encoder.eos_id is None:
        raise ConfigError("append_eos needs a tokenizer with an EOS token, and this one has none; set append_eos=false")
    tokens, counts = _tokenise(corpus, encoder, config, progress)
    document_D = np.flatnonzero(counts > 1)
    num_empty = int((counts == 0).sum())
    if not len(document_D):
        raise CorpusError(
            f"no document of {', '.join(corpus.sources)} can be used: {num_empty} are empty and "
            f"{len(counts) - num_empty} have a single token; at least one needs two tokens"
        )
    if config.packing == "window":
        layout = window_layout(counts[document_D], config.max_length)
    else:
        layout = ragged_layout(counts[document_D], config.max_length, prefix=encoder.bos_id is not None)
    return SequencePlan(corpus, config, layout, tokens, document_D, encoder.bos_id, num_empty)


def _tokenise(
    corpus: Corpus, encoder: Encoder, config: SequenceConfig, progress: Progress | None
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the tokens of all usable documents, one after another, and the number of tokens of every document."""
    num_tokens: list[int] = []  # of every document; 0 if empty
    with TokenSpool() as spool:
        for _, rows in corpus.iter_rows(_BATCH_DOCUMENTS):  # rather than iter_texts: it computes the fingerprint
            documents = _encode([text for text, _ in rows], encoder, config)
            num_tokens += [len(ids) for ids in documents]
            spool.append([ids for ids in documents if len(ids) > 1])
            if progress is not None:
                progress(len(num_tokens), len(corpus))
        return spool.finish(), np.array(num_tokens, np.int64)


def _encode(texts: list[str], encoder: Encoder, config: SequenceConfig) -> list[NDArray[np.uint32]]:
    """Encode the texts that are not empty; the others have no tokens, not even the tokenizer's special ones."""
    filled = [text for text in texts if text]
    encoded = list(reversed(encoder.encode(filled))) if filled else []
    # Every list is given up once it is an array, which takes a ninth of its memory.
    documents = [np.array(encoded.pop() if text else [], np.uint32) for text in texts]
    if not config.append_eos or encoder.eos_id is None:
        return documents
    eos = np.uint32(encoder.eos_id)
    return [np.append(ids, eos) if len(ids) and ids[-1] != eos else ids for ids in documents]


def with_metadata(columns: dict[str, Any], metadata: pa.Table) -> pa.Table:
    """Return ``columns`` as a table with those of ``metadata`` after them; a name that is taken gets ``corpus_``."""
    columns = dict(columns)
    for name in metadata.column_names:
        columns[_free_name(name, columns)] = metadata[name]
    return pa.table(columns)


def _free_name(name: str, taken: dict[str, Any]) -> str:
    while name in taken or name in STATISTICS_COLUMNS:
        name = f"corpus_{name}"
    return name
