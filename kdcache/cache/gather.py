"""Rows of several shards in one buffer per array, still encoded: a batch is copied once and decoded once.

A shuffled batch has a sequence or two from each of several shards. Decoding runs column by column over K columns, so
its cost per call is that of some hundred numpy calls, however few rows there are; copying the encoded rows together
first (3 bytes per kept id) makes it twice as fast as decoding each shard's rows and copying the results together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.shards import ShardArrays
from kdcache.fields import kind_of
from kdcache.schema import SequenceBatch


@dataclass(frozen=True)
class Piece:
    """Some sequences of one shard, by their numbers in it."""

    shard: int
    arrays: ShardArrays
    local: NDArray[np.int64]


@dataclass(frozen=True)
class RowSpans:
    """Where the rows of a batch are: ``spans`` are (piece, rows), in order, neighbours in one.

    The n-th sequence of the batch has rows ``offsets_N1[n]`` to ``offsets_N1[n + 1]`` of it; the n-th piece has rows
    ``piece_starts[n]`` to ``piece_starts[n + 1]``.
    """

    spans: list[tuple[int, slice]]
    offsets_N1: NDArray[np.int64]
    piece_starts: list[int]

    @classmethod
    def of(cls, offsets: Sequence[NDArray[np.int64]], local: Sequence[NDArray[np.int64]]) -> RowSpans:
        """Return the rows of sequences ``local[n]`` of the shard whose sequences begin at ``offsets[n]``."""
        starts_N = np.concatenate([begin[chosen] for begin, chosen in zip(offsets, local, strict=True)])
        stops_N = np.concatenate([begin[chosen + 1] for begin, chosen in zip(offsets, local, strict=True)])
        counts = [len(chosen) for chosen in local]
        piece_N = np.repeat(np.arange(len(counts)), counts)
        breaks = np.flatnonzero((stops_N[:-1] != starts_N[1:]) | (piece_N[:-1] != piece_N[1:])) + 1
        firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks - 1, [-1]])
        spans = [
            (piece, slice(start, stop))
            for piece, start, stop in zip(
                piece_N[firsts].tolist(), starts_N[firsts].tolist(), stops_N[lasts].tolist(), strict=True
            )
        ]
        offsets_N1 = np.concatenate([[0], np.cumsum(stops_N - starts_N)])
        return cls(spans, offsets_N1, offsets_N1[np.cumsum([0, *counts])].tolist())

    def gather(self, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the rows of the pieces' ``arrays``, one after another; a view where that is one span.

        Rows may have any shape. Narrower rectangles are filled up with zeros.
        """
        if len(self.spans) == 1:
            [(piece, rows)] = self.spans
            return arrays[piece][rows]
        if arrays[0].ndim != 2:
            return np.concatenate([arrays[piece][rows] for piece, rows in self.spans])
        width = max(array.shape[1] for array in arrays)
        # Columns that are contiguous stay so: codecs of kept ids decode column by column.
        is_by_rows = arrays[0].flags.c_contiguous
        result = np.empty((int(self.offsets_N1[-1]), width), arrays[0].dtype, "C" if is_by_rows else "F")
        start = 0
        for piece, rows in self.spans:
            stop, own_width = start + rows.stop - rows.start, arrays[piece].shape[1]
            result[start:stop, :own_width] = arrays[piece][rows]
            result[start:stop, own_width:] = 0
            start = stop
        return result


def runs_of(indices: Sequence[int], shard_starts: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """Split ``indices`` into runs within one shard, keeping their order: the shard, and numbers within it."""
    wanted_N = np.array(indices, dtype=np.int64)
    shards_N = np.searchsorted(shard_starts, wanted_N, side="right") - 1
    breaks = np.flatnonzero(np.diff(shards_N)) + 1
    local_N = wanted_N - shard_starts[shards_N]
    return list(zip(shards_N[[0, *breaks]].tolist(), np.split(local_N, breaks), strict=True))


def join(batches: list[SequenceBatch]) -> SequenceBatch:
    """Return the sequences of all ``batches``, one after another."""
    if len(batches) == 1:
        return batches[0]

    def join_offsets(values: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(offsets_N1) for offsets_N1 in values]))])

    def join_optional(name: str) -> NDArray[Any] | None:
        values = [getattr(batch, name) for batch in batches]
        return None if values[0] is None else np.concatenate(values)

    first = batches[0]
    return SequenceBatch(
        indices=[index for batch in batches for index in batch.indices],
        tokens_T=np.concatenate([batch.tokens_T for batch in batches]),
        token_offsets_N1=join_offsets([batch.token_offsets_N1 for batch in batches]),
        position_offsets_N1=join_offsets([batch.position_offsets_N1 for batch in batches]),
        loss_mask_P=np.concatenate([batch.loss_mask_P for batch in batches]),
        fields={
            name: kind_of(name, first).concatenate([batch.fields[name] for batch in batches]) for name in first.fields
        },
        segment_ids_T=join_optional("segment_ids_T"),
        labels_P=join_optional("labels_P"),
        token_index_P=join_optional("token_index_P"),
        kinds=first.kinds,
    )
