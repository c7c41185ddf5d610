"""Records: what flows between the layers and what stands in the manifest.

Shape suffixes used throughout kdcache: N sequences, T tokens, P positions (rows), K kept ids, V vocabulary, D width,
B batch, L positions of one padded sequence. Logarithms are natural; losses and entropies are in nats.

Two kinds of records live here. Dataclasses hold arrays in memory (`Targets`, `Sequence`, `SequenceBatch`);
frozen pydantic models (`Plan`, `ShardRecord`, `Manifest`) are written as JSON and describe a cache completely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

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
class Draws:
    """Tokens drawn with replacement from the teacher's distribution outside the kept ids (all of it where K is 0).

    ``ids_PJ`` are distinct in a row, ``counts_PJ`` say how often each was drawn. Rows have different numbers of
    distinct ids: what follows them has count 0 and stands for nothing.
    """

    ids_PJ: IntArray
    counts_PJ: IntArray


@dataclass
class Targets:
    """What the teacher knows at P positions, as float32 natural logarithms.

    ``ids_PK`` are the K most probable token ids, most probable first; ``logprobs_PK`` their log-probabilities over
    the true vocabulary; ``log_tail_P`` the log of the mass outside them (-inf when K = V); ``gold_logprob_P`` the
    log-probability of the corpus's own next token; ``entropy_P`` the entropy of the full distribution.

    Three parts are there only if the cache was made so. ``num_kept_P``: rows keep different numbers of ids, the
    first ``num_kept_P[p]`` of row p; its further columns repeat the row's first id with log-probability -inf.
    ``log_tails_PG``: log of the mass outside the kept ids at each of G temperatures. ``draws``: samples of the tail.
    """

    ids_PK: IntArray
    logprobs_PK: NDArray[np.float32]
    log_tail_P: NDArray[np.float32]
    gold_logprob_P: NDArray[np.float32]
    entropy_P: NDArray[np.float32]
    num_kept_P: IntArray | None = None
    log_tails_PG: NDArray[np.float32] | None = None
    draws: Draws | None = None

    @property
    def num_positions(self) -> int:
        """Number of rows."""
        return int(self.ids_PK.shape[0])

    @property
    def top_k(self) -> int:
        """Largest number of kept ids of a row, K."""
        return int(self.ids_PK.shape[1])

    @property
    def top1_ids_P(self) -> IntArray:
        """The teacher's favourite token; where no ids are kept, the one that was drawn most often."""
        if self.top_k or self.draws is None:
            return self.ids_PK[:, 0]
        best_P1 = self.draws.counts_PJ.argmax(axis=1)[:, None]
        return np.take_along_axis(self.draws.ids_PJ, best_P1, axis=1)[:, 0]

    def merged(self) -> tuple[IntArray, NDArray[np.float32], NDArray[np.float32]]:
        """Return ids [P, K + J], log-probabilities [P, K + J] and log tail [P] with the tail shared out to its draws.

        An id that was drawn c times of N has c / N of the mass outside the kept ids, whose expectation is its own
        probability. The ids of a row are distinct; places that stand for nothing repeat its first id with -inf.
        """
        if self.draws is None:
            return self.ids_PK, self.logprobs_PK, self.log_tail_P
        counts_PJ = self.draws.counts_PJ.astype(np.float32)
        num_P = counts_PJ.sum(axis=1)
        with np.errstate(divide="ignore"):
            share_PJ = np.log(counts_PJ) - np.log(np.maximum(num_P, 1))[:, None]
        drawn_PJ = np.where(counts_PJ > 0, self.log_tail_P[:, None] + share_PJ, np.float32(-np.inf))
        ids = np.concatenate([self.ids_PK, self.draws.ids_PJ.astype(self.ids_PK.dtype)], axis=1)
        logprobs = np.concatenate([self.logprobs_PK, drawn_PJ.astype(np.float32)], axis=1)
        ids = np.where(np.isneginf(logprobs), ids[:, :1], ids)
        return ids, logprobs, np.where(num_P > 0, np.float32(-np.inf), self.log_tail_P)

    def take(self, rows: NDArray[np.int64] | slice) -> Targets:
        """Return some rows."""
        return Targets(**{name: _map(value, lambda array: array[rows]) for name, value in vars(self).items()})

    @staticmethod
    def concatenate(parts: list[Targets]) -> Targets:
        """Return the rows of all ``parts``, one after another; narrower draws are filled up with count 0."""
        joined: dict[str, Any] = {}
        for name in vars(parts[0]):
            values = [getattr(part, name) for part in parts]
            if values[0] is None:
                joined[name] = None
            elif isinstance(values[0], Draws):
                joined[name] = Draws(*(_join_padded([getattr(v, a) for v in values]) for a in ("ids_PJ", "counts_PJ")))
            else:
                joined[name] = np.concatenate(values)
        return Targets(**joined)


def _map(value: Any, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Any:
    if value is None:
        return None
    return Draws(change(value.ids_PJ), change(value.counts_PJ)) if isinstance(value, Draws) else change(value)


def _join_padded(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    width = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays])


@dataclass
class SequenceBatch:
    """Some sequences of a cache, decoded, flat and without padding (sequence n owns a slice of every array).

    Sequence n has tokens ``tokens_T[token_offsets_N1[n]:token_offsets_N1[n + 1]]`` and rows
    ``[position_offsets_N1[n]:position_offsets_N1[n + 1]]`` of every per-position array. ``hidden`` maps the name of a
    layer to float32 [P, D]; ``last`` is the state that stands for the distribution (targets of the kind hidden).
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


Kind = Literal["top-k", "sampled", "hybrid", "hidden"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class TargetsRecord(Config):
    """What is kept of the teacher's distribution at every position.

    ``top-k``: the most probable ids with their log-probabilities and the exact mass of all others. ``sampled``: counts
    of draws from the whole distribution, an unbiased estimate of it. ``hybrid``: the most probable ids exactly, and
    draws from the others. ``hidden``: the last hidden state, from which the teacher's LM head (once per cache) makes
    the whole distribution again.
    """

    kind: Kind = "top-k"
    top_k: int = Field(default=64, ge=0)
    """Most ids kept at a position, K."""
    min_prob: float = Field(default=0.0, ge=0, lt=1)
    """Ids of a smaller probability are not kept (the most probable one always is)."""
    min_mass: float = Field(default=1.0, gt=0, le=1)
    """The smallest set of most probable ids that has this mass is kept."""
    num_draws: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the draws."""
    temperatures: tuple[float, ...] = ()
    """Temperatures other than 1 at which the mass outside the kept ids is stored."""
    tail_prior: bool = False
    """Whether the mean probability of every id while it is not kept is stored, once for the cache."""

    @property
    def is_ragged(self) -> bool:
        """Whether positions keep different numbers of ids."""
        return self.min_prob > 0 or self.min_mass < 1


class ArrayRecord(Config):
    """One array of a shard: ``rows`` says what its first axis counts, ``shape`` what follows it.

    Rows of ``entries`` are kept ids of all positions of a ragged cache, rows of ``draws`` the distinct drawn ids of all
    positions; both stand column by column (the first ones of all positions, then the second ones, and so on).
    """

    name: str
    dtype: str
    rows: Literal["positions", "tokens", "sequences", "table", "entries", "draws"]
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
    relative_error: float | None = None
    """Of hidden states: root mean square of |decoded - state| / |state| over the rows of a pilot."""


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
    num_entries: int = 0
    """Kept ids of all positions, where positions keep different numbers of them."""
    num_draws: int = 0
    """Distinct drawn ids of all positions."""
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
    targets: TargetsRecord
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
    def states_field(self) -> str:
        """Name of the field of the last hidden state, whether or not it is stored."""
        return f"hidden-{self.teacher.num_layers}"

    @property
    def top_k(self) -> int:
        """Most ids kept at a position, K."""
        return self.targets.top_k

    @property
    def hidden_layers(self) -> tuple[str, ...]:
        """Names of the stored hidden-state fields, such as ``hidden-30``."""
        return tuple(item.name for item in self.fields if item.name.startswith("hidden-"))


class Manifest(Plan):
    """A finished cache: its plan and the commit record of every shard."""

    shards: tuple[ShardRecord, ...]
    tokenizer_files: tuple[ObjectRecord, ...] = ()
    cache_files: tuple[ObjectRecord, ...] = ()
    """What exists once for the whole cache: the teacher's LM head, the tail prior."""

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
