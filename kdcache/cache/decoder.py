"""From encoded rows of open shards to a decoded batch.

All rows of a field are decoded by one call where its kind can: where it has no tables, or only tables of ids, which
are looked up shard by shard. A field with other tables (int8 hidden states) is decoded one shard's rows at a time. So
is every field after an error, because only then is it known which shard is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdcache.cache.gather import Piece, RowSpans
from kdcache.cache.limits import check_decoded, decoded_limit
from kdcache.cache.shards import FieldArrays, check_counts, load_fields, naming
from kdcache.codecs.ids import OpenTables, open_table
from kdcache.errors import CorruptCacheError
from kdcache.fields import TOKENS_FIELD, FieldKind
from kdcache.schema import Manifest, SequenceBatch
from kdcache.storage.folder import Folder


class BatchDecoder:
    """Opens and decodes fields of the shards of one cache; has no state, so threads may share it."""

    def __init__(
        self, folder: Folder, manifest: Manifest, fields: Mapping[str, FieldKind], most_bytes: int | None = None
    ) -> None:
        self._most_bytes = decoded_limit(most_bytes)
        self._folder = folder
        self._manifest = manifest
        self._fields = fields
        # Where an array of the field's own axis counts, it has one row per row of the field as soon as it is open.
        self._axes = {
            name: {
                array.name: array.rows if array.rows in ("tokens", "positions") else field.axis
                for array in field.record.arrays
                if array.rows not in ("table", "sequences")
            }
            for name, field in fields.items()
        }
        self._tables = {
            name: [array.name for array in field.record.arrays if array.rows == "table"]
            for name, field in fields.items()
        }

    def open(self, shard: int, names: Sequence[str], check_crc: bool = True) -> dict[str, FieldArrays]:
        """Read fields of a shard and open them for decoding; raises ``CorruptCacheError``."""
        record = self._manifest.shards[shard]
        loaded = load_fields(self._folder, self._manifest, record, names, check_crc, self._most_bytes)
        if TOKENS_FIELD in loaded:
            check_counts(self._folder, record, loaded[TOKENS_FIELD])
        for name in loaded:  # after `load_fields`, which has compared what is counted with what is there
            where = f"{self._folder}, shard {shard}, field {name}, file {record.objects[name].path}"
            check_decoded(self._fields[name].opened_bytes(record.num_rows), self._most_bytes, where)
        return {name: self._open(shard, name, arrays) for name, arrays in loaded.items()}

    def _open(self, shard: int, name: str, arrays: dict[str, Any]) -> FieldArrays:
        field = self._fields[name]
        with naming(self._folder, self._manifest, shard, name):
            opened = field.open(arrays)
        found = FieldArrays(opened, {table: open_table(opened[table]) for table in field.id_tables})
        # A batch may hold views of them: who changed it would change what everybody reads from then on.
        for named in (found.arrays, found.tables):
            for array in named.values():
                array.flags.writeable = False
        return found

    def decode(self, pieces: Sequence[Piece], names: Mapping[str, str]) -> SequenceBatch:
        """Return the sequences of ``pieces``; ``names`` are the fields to decode, by their names in the batch.

        ``indices`` are those within each shard. Raises ``CorruptCacheError``.
        """
        spans = _spans(pieces)
        tokens = self._decode(TOKENS_FIELD, pieces, spans)
        values = {field: self._decode(field, pieces, spans) for field in dict.fromkeys(names.values())}
        return SequenceBatch(
            indices=np.concatenate([piece.local for piece in pieces]).tolist(),
            tokens_T=tokens.tokens_T,
            token_offsets_N1=spans["tokens"].offsets_N1,
            position_offsets_N1=spans["positions"].offsets_N1,
            loss_mask_P=tokens.loss_mask_P,
            fields={name: values[field] for name, field in names.items()},
            segment_ids_T=tokens.segment_ids_T,
            labels_P=tokens.labels_P,
            token_index_P=tokens.token_index_P,
            kinds={TOKENS_FIELD: self._fields[TOKENS_FIELD]}
            | {name: self._fields[field] for name, field in names.items()},
        )

    def _decode(self, name: str, pieces: Sequence[Piece], spans: Mapping[str, RowSpans]) -> Any:
        field = self._fields[name]
        if set(self._tables[name]) <= set(field.id_tables):
            try:
                return field.decode(self._together(name, pieces, spans))
            except CorruptCacheError:
                pass  # raised again below, where it is known which shard is damaged
        return field.concatenate([self._alone(name, piece) for piece in pieces])

    def _together(self, name: str, pieces: Sequence[Piece], spans: Mapping[str, RowSpans]) -> dict[str, Any]:
        """Return the arrays of all rows, with tables that know their rows."""
        fields = [piece.arrays.fields[name] for piece in pieces]
        gathered: dict[str, Any] = {
            array: spans[axis].gather([field.arrays[array] for field in fields])
            for array, axis in self._axes[name].items()
        }
        starts = spans[self._fields[name].axis].piece_starts
        for table in self._tables[name]:
            gathered[table] = OpenTables([field.tables[table] for field in fields], starts)
        return gathered

    def _alone(self, name: str, piece: Piece) -> Any:
        """Decode the rows of one shard."""
        spans = _spans([piece])
        arrays = piece.arrays.fields[name].arrays
        rows = {array: spans[axis].gather([arrays[array]]) for array, axis in self._axes[name].items()}
        with naming(self._folder, self._manifest, piece.shard, name):
            return self._fields[name].decode({**rows, **{table: arrays[table] for table in self._tables[name]}})


def _spans(pieces: Sequence[Piece]) -> dict[str, RowSpans]:
    """Return where the rows of ``pieces`` are, by what they count."""
    local = [piece.local for piece in pieces]
    return {
        "tokens": RowSpans.of([piece.arrays.token_offsets_N1 for piece in pieces], local),
        "positions": RowSpans.of([piece.arrays.position_offsets_N1 for piece in pieces], local),
    }
