"""Records: what flows between the layers and what stands in the manifest.

Shape suffixes used throughout kdcache: N sequences, T tokens, P positions (rows), K kept ids, V vocabulary, D width,
B batch, L positions of one padded sequence. Logarithms are natural; losses and entropies are in nats.

Two kinds of records live here. Dataclasses hold arrays in memory (`Targets`, `Sequence`, `SequenceBatch`);
frozen pydantic models (`Plan`, `ShardRecord`, `Manifest`) are written as JSON and describe a cache completely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.config import Config

FORMAT_VERSION = 1

#: Columns that a writer adds to the per-sequence table; metadata of the corpus may not take their names.
STATISTICS_COLUMNS = ("num_targets", "teacher_loss", "teacher_entropy", "kept_mass")

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]


# --------------------------------------------------------------------------------------------- arrays in memory


@dataclass(frozen=True)
class Document:
    """One text of the corpus; ``id`` is stable between runs, ``metadata`` are its other columns."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sequence:
    """One training sequence: L + 1 tokens make L predicted positions.

    ``loss_mask_L`` is 0 where the next token must not be learnt (the first token of another document in a packed
    window). ``segment_ids_T`` numbers the documents of a packed window, None for a sequence of one document.
    """

    index: int
    tokens_T: NDArray[np.uint32]
    loss_mask_L: NDArray[np.uint8]
    segment_ids_T: NDArray[np.uint16] | None = None

    @property
    def num_positions(self) -> int:
        """Number of predicted positions, one fewer than tokens."""
        return len(self.tokens_T) - 1


def token_hash(tokens_T: IntArray) -> str:
    """Return the hash of a sequence's ids: 16 hexadecimal digits of BLAKE2b over them as little-endian uint32."""
    return hashlib.blake2b(np.ascontiguousarray(tokens_T, dtype="<u4").tobytes(), digest_size=8).hexdigest()


@dataclass
class Targets:
    """What the teacher knows at P positions, as float32 natural logarithms.

    ``ids_PK`` are the K most probable token ids, most probable first; ``logprobs_PK`` their log-probabilities over
    the true vocabulary; ``log_tail_P`` the log of the mass outside them (-inf when K = V); ``gold_logprob_P`` the
    log-probability of the corpus's own next token; ``entropy_P`` the entropy of the full distribution.
    """

    ids_PK: IntArray
    logprobs_PK: NDArray[np.float32]
    log_tail_P: NDArray[np.float32]
    gold_logprob_P: NDArray[np.float32]
    entropy_P: NDArray[np.float32]

    @property
    def num_positions(self) -> int:
        """Number of rows."""
        return int(self.ids_PK.shape[0])

    @property
    def top_k(self) -> int:
        """Number of kept ids per row."""
        return int(self.ids_PK.shape[1])


@dataclass
class SequenceBatch:
    """Some sequences of a cache, decoded, flat and without padding (sequence n owns a slice of every array).

    Sequence n has tokens ``tokens_T[token_offsets_N1[n]:token_offsets_N1[n + 1]]`` and rows
    ``[position_offsets_N1[n]:position_offsets_N1[n + 1]]`` of every per-position array. ``hidden`` maps the name of a
    layer to float32 [P, D].
    """

    indices: list[int]
    tokens_T: NDArray[np.uint32]
    token_offsets_N1: NDArray[np.int64]
    position_offsets_N1: NDArray[np.int64]
    loss_mask_P: NDArray[np.uint8]
    targets: Targets
    segment_ids_T: NDArray[np.uint16] | None = None
    hidden: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)


# --------------------------------------------------------------------------------------------- records in JSON


class TeacherRecord(Config):
    """Who the teacher is, by content: ``weights_sha256`` covers every parameter as it was loaded in ``dtype``."""

    name: str
    architecture: str
    weights_sha256: str
    dtype: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    """Rows of the teacher's LM head, padding included."""
    revision: str | None = None
    backend: str = "transformers"


class TokenizerRecord(Config):
    """Which tokenizer made the ids: ``sha256`` covers vocabulary, merges, normalisation and special tokens."""

    sha256: str
    vocab_size: int
    """True vocabulary size; ids at or above it are padding rows of the teacher and never stored."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


class CorpusRecord(Config):
    """Which documents were read; ``fingerprint`` covers the id and the text of every one, in order."""

    sources: tuple[str, ...]
    text_field: str
    fingerprint: str
    num_documents: int
    num_empty: int
    num_too_short: int
    metadata_columns: tuple[str, ...]
    licence: str | None = None


class ArrayRecord(Config):
    """One array of a shard: ``rows`` says what its first axis counts, ``shape`` what follows it."""

    name: str
    dtype: str
    rows: Literal["positions", "tokens", "sequences", "table"]
    shape: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        """Name of the array inside its object, such as ``positions/topk_gaps``."""
        return f"{self.rows}/{self.name}"


class FieldRecord(Config):
    """A group of arrays that is stored and read together, one object per shard; ``codec`` with all its parameters."""

    name: str
    codec: dict[str, Any]
    arrays: tuple[ArrayRecord, ...]


class ObjectRecord(Config):
    """One immutable file of a shard; ``path`` is relative to the cache."""

    path: str
    num_bytes: int
    sha256: str


class Statistics(Config):
    """Sums over the positions that count (loss mask 1), so that shards add up exactly."""

    num_positions: int = 0
    teacher_loss_sum: float = 0.0
    entropy_sum: float = 0.0
    kept_mass_sum: float = 0.0
    top1_correct: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        mine, theirs = self.model_dump(), other.model_dump()
        return Statistics(**{name: mine[name] + theirs[name] for name in mine})


class ShardRecord(Config):
    """The commit record of a shard, written after all of its objects: its presence makes the shard exist."""

    index: int
    attempt: str
    num_sequences: int
    num_tokens: int
    num_positions: int
    objects: dict[str, ObjectRecord]
    """By field name; ``sequences`` is the per-sequence Arrow table."""
    statistics: Statistics

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(item.num_bytes for item in self.objects.values())


class Plan(Config):
    """Everything that is fixed before the teacher runs; two dumps with equal plans write the same content."""

    format_version: int = FORMAT_VERSION
    task: str
    teacher: TeacherRecord
    tokenizer: TokenizerRecord
    corpus: CorpusRecord
    sequences: dict[str, Any]
    """How documents became sequences (max_length, packing, ...)."""
    fields: tuple[FieldRecord, ...]
    num_sequences: int
    num_positions: int
    num_tokens: int
    num_shards: int
    shard_positions: int
    """Positions after which a shard is closed, from which everyone derives the same shards."""
    table_sha256: str
    """Hash of plan.parquet."""
    provenance: dict[str, Any]
    """Versions, command and time of creation: for people, never compared."""

    def field(self, name: str) -> FieldRecord:
        """Return the field called ``name`` (KeyError if the cache has none)."""
        for item in self.fields:
            if item.name == name:
                return item
        raise KeyError(name)

    @property
    def top_k(self) -> int:
        """Number of ids kept at every position, K."""
        return next((a.shape[0] for a in self.field("targets").arrays if a.rows == "positions" and a.shape), 0)

    @property
    def hidden_layers(self) -> tuple[str, ...]:
        """Names of the stored hidden-state fields, such as ``hidden-30``."""
        return tuple(item.name for item in self.fields if item.name.startswith("hidden-"))


class Manifest(Plan):
    """A finished cache: its plan and the commit record of every shard."""

    shards: tuple[ShardRecord, ...]
    tokenizer_files: tuple[ObjectRecord, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per predicted position."""
        return self.num_bytes / max(self.num_positions, 1)

    @property
    def statistics(self) -> Statistics:
        """Sums over all shards."""
        return sum((shard.statistics for shard in self.shards), Statistics())
