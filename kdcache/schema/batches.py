"""Records in memory: documents, sequences, targets and batches, as arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Document:
    """One text of the corpus; ``id`` is stable between runs, ``metadata`` are its other columns."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


#: Label of positions without one, where labels are integers; where they are floats, NaN.
NO_LABEL = -1


@dataclass(frozen=True)
class Sequence:
    """One training sequence: T tokens that models are fed, and L positions that the teacher predicts (see the task).

    ``loss_mask_L`` is 0 at positions that must not be learnt (the first token of another document in a packed window).
    ``segment_ids_T`` numbers the segments of a sequence (documents of a packed window, first and second text, input and
    target); None for a single one. ``labels_L`` are the gold labels where they are not the next tokens: int64 classes
    or ids (`NO_LABEL`: none), or float32 numbers (NaN: none). ``token_index_L`` are the indices, in the sequence, of
    the tokens that the positions belong to, where only some tokens have one.
    """

    index: int
    tokens_T: NDArray[np.uint32]
    loss_mask_L: NDArray[np.uint8]
    segment_ids_T: NDArray[np.uint16] | None = None
    labels_L: NDArray[Any] | None = None
    token_index_L: NDArray[np.uint32] | None = None

    @property
    def num_positions(self) -> int:
        """Number of positions, L."""
        return len(self.loss_mask_L)

    @property
    def num_fed(self) -> int:
        """About how many tokens a model reads: a causal one never reads the last."""
        return max(len(self.tokens_T) - 1, 1)


def token_hash(tokens_T: IntArray) -> str:
    """Return the hash of a sequence's ids: 16 hexadecimal digits of BLAKE2b over them as little-endian uint32."""
    return hashlib.blake2b(np.ascontiguousarray(tokens_T, dtype="<u4").tobytes(), digest_size=8).hexdigest()


@dataclass
class Samples:
    """Ids sampled with replacement from the teacher's distribution outside the kept ids (all of it where K is 0).

    ``ids_PJ`` are distinct in a row, ``counts_PJ`` are how often each was sampled. Rows have different numbers of
    distinct ids; the rest is padding with count 0.
    """

    ids_PJ: IntArray
    counts_PJ: IntArray


@dataclass
class Targets:
    """The teacher's targets at P positions, as float32 natural logarithms.

    ``ids_PK`` are the K most probable ids, most probable first; ``logprobs_PK`` their log-probabilities over
    the true vocabulary; ``log_tail_P`` the log of the mass outside them (-inf when K = V); ``gold_logprob_P`` the
    log-probability of the gold label; ``entropy_P`` the entropy of the full distribution. The last two are None where
    the teacher does not know them or the cache does not store them.

    Three members are None unless the cache has them. ``num_kept_P``: rows keep different numbers of ids, the first
    ``num_kept_P[p]`` of row p; its further columns are padding, which repeats the row's first id with log-probability
    -inf. ``log_tails_PG``: log of the mass outside the kept ids at each of G temperatures. ``samples``: samples of the
    tail.

    ``gold_logprob_P`` is NaN at positions without a label. Ids are those of tokens, or of classes in tasks with
    classes. Targets of the kind outputs are empty (see `Targets.nothing`).
    """

    ids_PK: IntArray
    logprobs_PK: NDArray[np.float32]
    log_tail_P: NDArray[np.float32]
    gold_logprob_P: NDArray[np.float32] | None = None
    entropy_P: NDArray[np.float32] | None = None
    num_kept_P: IntArray | None = None
    log_tails_PG: NDArray[np.float32] | None = None
    samples: Samples | None = None

    @property
    def num_positions(self) -> int:
        """Number of positions, P."""
        return int(self.ids_PK.shape[0])

    @property
    def top_k(self) -> int:
        """Largest number of kept ids of a row, K."""
        return int(self.ids_PK.shape[1])

    @property
    def top1_ids_P(self) -> IntArray:
        """The teacher's top-1 ids; where no ids are kept, those that were sampled most often."""
        if self.top_k or self.samples is None:
            return self.ids_PK[:, 0]
        best_P1 = self.samples.counts_PJ.argmax(axis=1)[:, None]
        return np.take_along_axis(self.samples.ids_PJ, best_P1, axis=1)[:, 0]

    @staticmethod
    def nothing(num_positions: int) -> Targets:
        """Return the targets of a teacher without a distribution: no ids, no tail, no labels."""
        zeros_P = np.zeros(num_positions, np.float32)
        return Targets(
            ids_PK=np.zeros((num_positions, 0), np.int32),
            logprobs_PK=np.zeros((num_positions, 0), np.float32),
            log_tail_P=zeros_P,
            gold_logprob_P=np.full(num_positions, np.nan, np.float32),
            entropy_P=zeros_P,
        )

    def merged(self) -> tuple[IntArray, NDArray[np.float32], NDArray[np.float32]]:
        """Return ids [P, K + J], log-probabilities [P, K + J] and log tail [P] with the tail shared out to its samples.

        An id that was sampled c times of N has c / N of the mass outside the kept ids, whose expectation is its own
        probability. The ids of a row are distinct; padding repeats its first id with -inf.
        """
        if self.samples is None:
            return self.ids_PK, self.logprobs_PK, self.log_tail_P
        counts_PJ = self.samples.counts_PJ.astype(np.float32)
        num_P = counts_PJ.sum(axis=1)
        with np.errstate(divide="ignore"):
            share_PJ = np.log(counts_PJ) - np.log(np.maximum(num_P, 1))[:, None]
        sampled_PJ = np.where(counts_PJ > 0, self.log_tail_P[:, None] + share_PJ, np.float32(-np.inf))
        ids = np.concatenate([self.ids_PK, self.samples.ids_PJ.astype(self.ids_PK.dtype)], axis=1)
        logprobs = np.concatenate([self.logprobs_PK, sampled_PJ.astype(np.float32)], axis=1)
        ids = np.where(np.isneginf(logprobs), ids[:, :1], ids)
        return ids, logprobs, np.where(num_P > 0, np.float32(-np.inf), self.log_tail_P)

    def take(self, rows: NDArray[np.int64] | slice) -> Targets:
        """Return some positions."""
        return Targets(**{name: _map(value, lambda array: array[rows]) for name, value in vars(self).items()})

    @staticmethod
    def concatenate(parts: list[Targets]) -> Targets:
        """Return the targets of all ``parts``, in this order; narrower samples are padded with count 0."""
        joined: dict[str, Any] = {}
        for name in vars(parts[0]):
            values = [getattr(part, name) for part in parts]
            if values[0] is None:
                joined[name] = None
            elif isinstance(values[0], Samples):
                joined[name] = Samples(
                    *(_join_padded([getattr(v, a) for v in values]) for a in ("ids_PJ", "counts_PJ"))
                )
            else:
                joined[name] = np.concatenate(values)
        return Targets(**joined)


def _map(value: Any, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Any:
    if value is None:
        return None
    return Samples(change(value.ids_PJ), change(value.counts_PJ)) if isinstance(value, Samples) else change(value)


def _join_padded(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    width = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays])


@dataclass
class SequenceBatch:
    """Some sequences of a cache, decoded, flat and without padding (sequence n owns a slice of every array).

    Sequence n has tokens ``tokens_T[token_offsets_N1[n]:token_offsets_N1[n + 1]]`` and positions
    ``[position_offsets_N1[n]:position_offsets_N1[n + 1]]`` of every array over positions. ``labels_P`` and
    ``token_index_P`` are those of `Sequence`, where the task stores them.

    ``fields`` are the decoded values of all other fields that were read, by name: `Targets` for ``targets``, float32
    arrays for vectors. ``last`` is the hidden state that stands for the distribution (targets of the kind hidden).
    ``kinds`` are the field kinds that decoded them.
    """

    indices: list[int]
    tokens_T: NDArray[np.uint32]
    token_offsets_N1: NDArray[np.int64]
    position_offsets_N1: NDArray[np.int64]
    loss_mask_P: NDArray[np.uint8]
    fields: dict[str, Any] = field(default_factory=dict)
    segment_ids_T: NDArray[np.uint16] | None = None
    labels_P: NDArray[Any] | None = None
    token_index_P: NDArray[np.uint32] | None = None
    kinds: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_positions(self) -> int:
        """Number of positions, P."""
        return len(self.loss_mask_P)

    @property
    def targets(self) -> Targets:
        """The targets of all positions; `Targets.nothing` where the teacher gives no distribution."""
        if "targets" not in self.fields:
            self.fields["targets"] = Targets.nothing(self.num_positions)
        found: Targets = self.fields["targets"]
        return found

    @targets.setter
    def targets(self, targets: Targets) -> None:
        self.fields["targets"] = targets

    @property
    def hidden(self) -> dict[str, Any]:
        """The fields in addition to the targets: hidden states, raw outputs, and those of other kinds."""
        return {name: value for name, value in self.fields.items() if name != "targets"}

    def __len__(self) -> int:
        return len(self.indices)

    def sequences(self) -> list[Sequence]:
        """Return the sequences one by one, as views."""

        def split(array: NDArray[Any] | None, offsets_N1: NDArray[np.int64]) -> list[Any]:
            return [None] * len(self) if array is None else np.split(array, offsets_N1[1:-1])

        parts = (
            split(self.tokens_T, self.token_offsets_N1),
            split(self.loss_mask_P, self.position_offsets_N1),
            split(self.segment_ids_T, self.token_offsets_N1),
            split(self.labels_P, self.position_offsets_N1),
            split(self.token_index_P, self.position_offsets_N1),
        )
        return [Sequence(index, *arrays) for index, *arrays in zip(self.indices, *parts, strict=True)]
