"""Compute where sequences begin and end in the stream of all kept documents, for all sequences at once.

The stream is the kept documents one after another; a sequence is a range of it. Both ways of cutting predict every
token exactly once, because neighbouring ranges share one token: the last target of one is the first input of the
next. With M positions per sequence:

- ragged: a document of n tokens gives ranges [s M, min((s + 1) M + 1, n)) for s = 0 .. ceil((n - 1) / M) - 1;
- ragged with BOS (``prefix``): continuations are fed a BOS first, which takes one of their M inputs, so the first
  range covers M targets and each further one M - 1. The row of that BOS predicts a token that the previous sequence
  has predicted already: its loss mask is 0;
- windows: the whole stream is cut like one document, without BOS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Ranges of N sequences in the stream: ``[starts_N, stops_N)`` of documents ``first_N`` to ``last_N``.

    ``offsets_D1`` are the documents' own ranges (document d owns ``[offsets_D1[d], offsets_D1[d + 1])``);
    ``has_prefix_N`` marks the sequences that are fed a BOS before their range.
    """

    offsets_D1: Int64
    starts_N: Int64
    stops_N: Int64
    first_N: Int64
    last_N: Int64
    has_prefix_N: NDArray[np.bool_]

    @property
    def lengths_N(self) -> Int64:
        """Positions of every sequence, one fewer than its tokens."""
        return self.stops_N - self.starts_N + self.has_prefix_N - 1

    def pieces(self, start: int, stop: int) -> tuple[Int64, Int64, Int64, Int64]:
        """Cut sequences ``start`` to ``stop`` at document borders.

        Returns for every piece the sequence, the document (as a row of ``offsets_D1``), the offset of the piece's
        first token in that document and its number of tokens (without BOS prefix).
        """
        first_N, last_N = self.first_N[start:stop], self.last_N[start:stop]
        sequence = np.repeat(np.arange(len(first_N)), last_N - first_N + 1)
        document = np.repeat(first_N, last_N - first_N + 1) + _ranks(last_N - first_N + 1)
        begin = np.maximum(self.starts_N[start:stop][sequence], self.offsets_D1[document])
        end = np.minimum(self.stops_N[start:stop][sequence], self.offsets_D1[document + 1])
        return sequence + start, document, begin - self.offsets_D1[document], end - begin


def ragged_layout(num_tokens_D: Int64, max_length: int, *, prefix: bool) -> Layout:
    """Cut every document by itself into sequences of at most ``max_length`` positions; each has 2 tokens or more."""
    advance = max_length - 1 if prefix else max_length
    further_D = np.maximum(num_tokens_D - 1 - max_length, 0)
    counts_D = 1 + -(-further_D // advance)
    document_N = np.repeat(np.arange(len(num_tokens_D)), counts_D)
    rank_N = _ranks(counts_D)
    has_prefix_N = (rank_N > 0) & prefix
    begin_N = np.where(rank_N == 0, 0, max_length + (rank_N - 1) * advance)
    end_N = np.minimum(begin_N + max_length + 1 - has_prefix_N, num_tokens_D[document_N])
    offsets_D1 = _offsets(num_tokens_D)
    origin_N = offsets_D1[document_N]
    return Layout(offsets_D1, origin_N + begin_N, origin_N + end_N, document_N, document_N, has_prefix_N)


def window_layout(num_tokens_D: Int64, max_length: int) -> Layout:
    """Cut the stream of all documents into windows of ``max_length`` positions; only the last may be shorter."""
    offsets_D1 = _offsets(num_tokens_D)
    size = int(offsets_D1[-1])
    starts_N = np.arange(0, max(size - 1, 0), max_length, dtype=np.int64)
    stops_N = np.minimum(starts_N + max_length + 1, size)
    first_N = np.searchsorted(offsets_D1, starts_N, side="right") - 1
    last_N = np.searchsorted(offsets_D1, stops_N - 1, side="right") - 1
    return Layout(offsets_D1, starts_N, stops_N, first_N, last_N, np.zeros(len(starts_N), bool))


def assign_shards(lengths_N: ArrayLike, shard_positions: int) -> Int64:
    """Return the first sequence of every shard and, last, the number of sequences: [num_shards + 1] int64.

    A shard is the fewest consecutive sequences that reach ``shard_positions`` positions; the last may be smaller.
    """
    ends_N = np.cumsum(np.asarray(lengths_N, np.int64))
    starts = [0]
    while starts[-1] < len(ends_N):
        before = int(ends_N[starts[-1] - 1]) if starts[-1] else 0
        reached = int(np.searchsorted(ends_N, before + shard_positions))
        starts.append(min(reached + 1, len(ends_N)))
    return np.array(starts, np.int64)


def _offsets(counts: Int64) -> Int64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _ranks(counts: Int64) -> Int64:
    """Number the members of consecutive groups of the given sizes: [2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(_offsets(counts)[:-1], counts)
