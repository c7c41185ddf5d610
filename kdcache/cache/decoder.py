"""From encoded rows of open shards to a decoded batch.

All rows of a field are decoded by one call where its codec can: where it has no tables, or only tables of ids, which
are looked up shard by shard. A codec with other tables (int8 hidden states, a codec of somebody else's) decodes one
shard's rows at a time. So does every codec after an error, because only then is it known which shard is damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.gather import Piece, RowSpans
from kdcache.cache.shards import ShardArrays, naming
from kdcache.codecs import TargetsCodec, VectorCodec
from kdcache.codecs.ids import OpenTables, open_table
from kdcache.errors import CorruptCacheError
from kdcache.schema import Manifest, SequenceBatch, Targets
from kdcache.storage.folder import Folder

#: Rows of arrays that have one row per position as soon as their shard is open.
_PER_POSITION = ("positions", "entries", "samples")
#: Arrays of the targets' field that its codec does not read.
_NO_TARGETS = ("loss_mask", "labels", "token_index")


class BatchDecoder:
    """Decodes rows of the shards of one cache; has no state, so threads may share it."""

    def __init__(
        self, folder: Folder, manifest: Manifest, targets: TargetsCodec, hidden: dict[str, VectorCodec]
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._targets = targets
        self._hidden = hidden
        self._per_position, self._tables = {}, {}
        for field in manifest.fields:
            names = [a.name for a in field.arrays if a.rows in _PER_POSITION and a.name not in _NO_TARGETS]
            self._per_position[field.name] = names
            self._tables[field.name] = [a.name for a in field.arrays if a.rows == "table"]

    def open(self, shard: int, arrays: ShardArrays) -> ShardArrays:
        """Turn the targets of a shard, as unpacked, into rectangles and open its tables of ids, in place."""
        with naming(self._folder, self._manifest, shard, layout.TARGETS_FIELD):
            targets = self._targets.open(arrays.fields[layout.TARGETS_FIELD])
        arrays.fields[layout.TARGETS_FIELD] = targets
        arrays.tables = {name: open_table(targets[name]) for name in self._targets.id_tables}
        # A batch may hold views of them: who changed it would change what everybody reads from then on.
        for named in (*arrays.fields.values(), arrays.tables):
            for array in named.values():
                array.flags.writeable = False
        return arrays

    def decode(self, pieces: Sequence[Piece], layers: dict[str, str]) -> SequenceBatch:
        """Return the sequences of ``pieces``; ``layers`` are fields of hidden states by their name in the batch.

        ``indices`` are those within each shard. Raises ``CorruptCacheError``.
        """
        local = [piece.local for piece in pieces]
        tokens = RowSpans.of([piece.arrays.token_offsets_N1 for piece in pieces], local)
        positions = RowSpans.of([piece.arrays.position_offsets_N1 for piece in pieces], local)
        beside = [piece.arrays.fields[layout.TARGETS_FIELD] for piece in pieces]
        states = {field: self._decode_states(field, pieces, positions) for field in dict.fromkeys(layers.values())}
        return SequenceBatch(
            indices=np.concatenate(local).tolist(),
            tokens_T=tokens.gather([arrays["tokens"] for arrays in beside]).astype(np.uint32),
            token_offsets_N1=tokens.offsets_N1,
            position_offsets_N1=positions.offsets_N1,
            # A copy, since positions that shall not count are what a loop of one's own changes most often.
            loss_mask_P=positions.gather([arrays["loss_mask"] for arrays in beside]).astype(np.uint8),
            targets=self._decode_targets(pieces, positions),
            segment_ids_T=(
                tokens.gather([arrays["segment_ids"] for arrays in beside]) if "segment_ids" in beside[0] else None
            ),
            labels_P=_labels(positions, beside),
            token_index_P=positions.gather([a["token_index"] for a in beside]) if "token_index" in beside[0] else None,
            hidden={name: states[field] for name, field in layers.items()},
        )

    def _decode_targets(self, pieces: Sequence[Piece], positions: RowSpans) -> Targets:
        field = layout.TARGETS_FIELD
        if self._manifest.targets.kind == "outputs":
            return Targets.nothing(int(positions.offsets_N1[-1]))
        if set(self._tables[field]) <= set(self._targets.id_tables):
            try:
                return self._targets.decode(self._together(field, pieces, positions))
            except CorruptCacheError:
                pass  # said again, with the place, below
        return Targets.concatenate([self._alone(field, self._targets, piece) for piece in pieces])

    def _decode_states(self, field: str, pieces: Sequence[Piece], positions: RowSpans) -> NDArray[np.float32]:
        codec = self._hidden[field]
        if not self._tables[field]:
            return codec.decode(self._together(field, pieces, positions))
        return np.concatenate([self._alone(field, codec, piece) for piece in pieces])

    def _together(self, field: str, pieces: Sequence[Piece], positions: RowSpans) -> dict[str, Any]:
        """Return the arrays of all rows, with tables that know their rows."""
        arrays = [piece.arrays.fields[field] for piece in pieces]
        gathered: dict[str, Any] = {
            name: positions.gather([one[name] for one in arrays]) for name in self._per_position[field]
        }
        for name in self._tables[field]:
            gathered[name] = OpenTables([piece.arrays.tables[name] for piece in pieces], positions.piece_starts)
        return gathered

    def _alone(self, field: str, codec: TargetsCodec | VectorCodec, piece: Piece) -> Any:
        """Decode the rows of one shard."""
        positions = RowSpans.of([piece.arrays.position_offsets_N1], [piece.local])
        arrays = piece.arrays.fields[field]
        rows = {name: positions.gather([arrays[name]]) for name in self._per_position[field]}
        with naming(self._folder, self._manifest, piece.shard, field):
            return codec.decode({**rows, **{name: arrays[name] for name in self._tables[field]}})


def _labels(positions: RowSpans, beside: Sequence[dict[str, NDArray[Any]]]) -> NDArray[Any] | None:
    """Return the stored labels of all rows: whole numbers as int64, others as float32."""
    if "labels" not in beside[0]:
        return None
    labels_P = positions.gather([arrays["labels"] for arrays in beside])
    return labels_P.astype(np.int64 if labels_P.dtype.kind == "i" else np.float32)
