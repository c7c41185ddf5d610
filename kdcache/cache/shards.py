"""One shard in memory: its arrays unpacked but still encoded, and the rows of some of its sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.folder import Folder
from kdcache.cache.shard_file import unpack
from kdcache.errors import CorruptCacheError
from kdcache.schema import FieldRecord, Manifest, ShardRecord


@dataclass
class ShardArrays:
    """The arrays of a shard, unpacked but still encoded, by field and array name."""

    fields: dict[str, dict[str, NDArray[Any]]]
    token_offsets_N1: NDArray[np.int64]
    position_offsets_N1: NDArray[np.int64]


def load_table(folder: Folder, shard: ShardRecord, columns: Iterable[str] = ()) -> pa.Table:
    """Read the per-sequence table of a shard, which must have ``columns``; raises ``CorruptCacheError``."""
    record = shard.objects[layout.SEQUENCES_FIELD]
    where = f"{folder}, shard {shard.index}, field {layout.SEQUENCES_FIELD}"
    table = layout.table_from_ipc(layout.read_object(folder, record, where), f"{where}, file {record.path}")
    missing = [name for name in columns if name not in table.column_names]
    if missing or table.num_rows != shard.num_sequences:
        found = f"no column {missing[0]!r}" if missing else f"{table.num_rows} rows for {shard.num_sequences} sequences"
        raise CorruptCacheError(f"{where}, file {record.path}: the per-sequence table has {found}")
    return table


def load_shard(folder: Folder, manifest: Manifest, shard: ShardRecord, fields: Iterable[str]) -> ShardArrays:
    """Read and unpack the named fields of a shard; raises ``CorruptCacheError`` naming file, shard and field."""
    loaded = {name: _load_field(folder, layout.field_of(manifest, name), shard) for name in fields}
    targets = loaded[layout.TARGETS_FIELD]
    token_offsets, position_offsets = (
        np.concatenate([[0], np.cumsum(targets[name], dtype=np.int64)]) for name in ("num_tokens", "num_positions")
    )
    if token_offsets[-1] != shard.num_tokens or position_offsets[-1] != shard.num_positions:
        raise CorruptCacheError(
            f"{folder}, shard {shard.index}, field {layout.TARGETS_FIELD}: sequences add up to {token_offsets[-1]} "
            f"tokens and {position_offsets[-1]} positions, the manifest says {shard.num_tokens} and "
            f"{shard.num_positions}"
        )
    return ShardArrays(loaded, token_offsets, position_offsets)


def _load_field(folder: Folder, record: FieldRecord, shard: ShardRecord) -> dict[str, NDArray[Any]]:
    item = shard.objects[record.name]
    where = f"{folder}, shard {shard.index}, field {record.name}"
    data = layout.read_object(folder, item, where)
    rows = {
        "positions": shard.num_positions,
        "tokens": shard.num_tokens,
        "sequences": shard.num_sequences,
        "entries": shard.num_entries,
        "draws": shard.num_draws,
        "table": None,
    }
    expected = {array.path: (array, rows[array.rows]) for array in record.arrays}
    unpacked = unpack(data, expected, f"{where}, file {item.path}")
    return {array.name: unpacked[array.path] for array in record.arrays}


def row_spans(offsets_N1: NDArray[np.int64], chosen: list[int]) -> tuple[list[slice], NDArray[np.int64]]:
    """Return the rows of the ``chosen`` sequences, neighbours in one slice, and the offsets of each among them."""
    starts, stops = offsets_N1[chosen], offsets_N1[[n + 1 for n in chosen]]
    breaks = np.flatnonzero(stops[:-1] != starts[1:]) + 1
    firsts, lasts = starts[[0, *breaks]].tolist(), stops[[*(breaks - 1), -1]].tolist()
    spans = [slice(first, last) for first, last in zip(firsts, lasts, strict=True)]
    return spans, np.concatenate([[0], np.cumsum(stops - starts)])


def take_rows(values: NDArray[Any], spans: list[slice]) -> NDArray[Any]:
    """Return the rows in ``spans``, one after another; a view where that is one span."""
    if len(spans) == 1:  # a view
        return values[spans[0]]
    if values.ndim == 2 and not values.flags.c_contiguous:
        # Columns are contiguous, and stay so: the codecs decode column by column.
        return np.concatenate([values.T[:, span] for span in spans], axis=1).T
    return np.concatenate([values[span] for span in spans])
