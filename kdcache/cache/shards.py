"""One shard in memory: its arrays unpacked but still encoded, and the rows of some of its sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.shard_file import unpack
from kdcache.errors import CorruptCacheError
from kdcache.schema import FieldRecord, Manifest, ObjectRecord, ShardRecord
from kdcache.storage.folder import Folder

T = TypeVar("T")


@dataclass
class ShardArrays:
    """The arrays of a shard, unpacked but still encoded, by field and array name.

    ``tables`` are the tables of ids that were opened for reading rows of several shards together.
    """

    fields: dict[str, dict[str, NDArray[Any]]]
    token_offsets_N1: NDArray[np.int64]
    position_offsets_N1: NDArray[np.int64]
    tables: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for arrays in (*self.fields.values(), self.tables) for array in arrays.values())


@contextlib.contextmanager
def naming(folder: Folder, manifest: Manifest, shard: int, name: str) -> Iterator[None]:
    """Name the place, field ``name`` of a shard, in errors of codecs, which know of no files."""
    try:
        yield
    except CorruptCacheError as error:
        path = manifest.shards[shard].objects[name].path
        raise CorruptCacheError(f"{folder}, shard {shard}, field {name}, file {path}: {error}") from None


def load_shard(
    folder: Folder, manifest: Manifest, shard: ShardRecord, fields: Iterable[str], check_crc: bool = True
) -> ShardArrays:
    """Read and unpack the named fields of a shard; raises ``CorruptCacheError`` naming file, shard and field."""
    loaded = {name: _load_field(folder, layout.field_of(manifest, name), shard, check_crc) for name in fields}
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


def _load_field(folder: Folder, record: FieldRecord, shard: ShardRecord, check_crc: bool) -> dict[str, NDArray[Any]]:
    item = shard.objects[record.name]
    where = f"{folder}, shard {shard.index}, field {record.name}"
    # A shard that does not count an axis has no rows of it.
    rows = {array.rows: shard.num_rows.get(array.rows, 0) for array in record.arrays} | {"table": None}
    expected = {array.path: (array, rows[array.rows]) for array in record.arrays}
    parse = partial(unpack, expected=expected, where=f"{where}, file {item.path}", check_crc=check_crc)
    unpacked = parsed_object(folder, item, where, parse)
    return {array.name: unpacked[array.path] for array in record.arrays}


def parsed_object(folder: Folder, record: ObjectRecord, where: str, parse: Callable[[bytes], T]) -> T:
    """Return what ``parse`` makes of an object; a copy on this machine that has gone bad is downloaded again."""
    try:
        return parse(layout.read_object(folder, record, where))
    except CorruptCacheError:
        if folder.store is None or not folder.store.drop_damaged(record):
            raise
    return parse(layout.read_object(folder, record, where))
