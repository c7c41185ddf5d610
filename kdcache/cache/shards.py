"""One shard in memory: its fields, unpacked but still encoded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.limits import decoded_limit
from kdcache.cache.shard_file import unpack
from kdcache.errors import CorruptCacheError
from kdcache.fields import TOKENS_FIELD
from kdcache.schema import FieldRecord, Manifest, ObjectRecord, ShardRecord
from kdcache.storage.folder import Folder

T = TypeVar("T")


@dataclass
class FieldArrays:
    """The arrays of one field of a shard, unpacked but still encoded, by name.

    ``tables`` are the tables of ids that were opened for reading rows of several shards together.
    """

    arrays: dict[str, NDArray[Any]]
    tables: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for named in (self.arrays, self.tables) for array in named.values())


@dataclass
class ShardArrays:
    """Some opened fields of a shard by name, the tokens always among them."""

    fields: dict[str, FieldArrays]

    @property
    def token_offsets_N1(self) -> NDArray[np.int64]:
        """First token of every sequence, and their number."""
        return self.fields[TOKENS_FIELD].arrays["token_offsets"]

    @property
    def position_offsets_N1(self) -> NDArray[np.int64]:
        """First position of every sequence, and their number."""
        return self.fields[TOKENS_FIELD].arrays["position_offsets"]


@contextlib.contextmanager
def naming(folder: Folder, manifest: Manifest, shard: int, name: str) -> Iterator[None]:
    """Add folder, shard, field ``name`` and file to errors of codecs, which see arrays only."""
    try:
        yield
    except CorruptCacheError as error:
        path = manifest.shards[shard].objects[name].path
        raise CorruptCacheError(f"{folder}, shard {shard}, field {name}, file {path}: {error}") from None


def load_fields(
    folder: Folder,
    manifest: Manifest,
    shard: ShardRecord,
    names: Iterable[str],
    check_crc: bool = True,
    most_bytes: int | None = None,
) -> dict[str, dict[str, NDArray[Any]]]:
    """Read and unpack the named fields of a shard.

    Raises ``CorruptCacheError`` naming file, shard and field, and ``CacheError`` for a field that would take more than
    ``most_bytes`` in memory (default: `kdcache.cache.limits`), before anything is allocated.
    """
    most = decoded_limit(most_bytes)
    return {name: _load_field(folder, layout.field_of(manifest, name), shard, check_crc, most) for name in names}


def check_counts(folder: Folder, shard: ShardRecord, arrays: dict[str, NDArray[Any]]) -> None:
    """Raise ``CorruptCacheError`` when the lengths of a shard's sequences do not add up to what its record counts."""
    for axis in ("tokens", "positions"):
        found, recorded = int(arrays[f"num_{axis}"].sum(dtype=np.int64)), shard.num_rows[axis]
        if found != recorded:
            raise CorruptCacheError(
                f"{folder}, shard {shard.index}, field {TOKENS_FIELD}: sequences add up to {found} {axis}, the "
                f"manifest says {recorded}"
            )


def _load_field(
    folder: Folder, record: FieldRecord, shard: ShardRecord, check_crc: bool, most_bytes: int
) -> dict[str, NDArray[Any]]:
    item = shard.objects[record.name]
    where = f"{folder}, shard {shard.index}, field {record.name}"
    # A shard that does not count an axis has no rows of it.
    rows = {array.rows: shard.num_rows.get(array.rows, 0) for array in record.arrays} | {"table": None}
    expected = {array.path: (array, rows[array.rows]) for array in record.arrays}

    def parse(data: bytes) -> dict[str, NDArray[Any]]:
        file = f"{where}, file {item.path}"
        unpacked = unpack(data, expected, file, check_crc=check_crc, most_bytes=most_bytes)
        # The checksums of chunks agree in a whole object of another shard, too; copies in a store were compared before.
        if check_crc and folder.store is None and item.path not in folder.checked:
            if layout.sha256(data) != item.sha256:
                raise CorruptCacheError(
                    f"{file}: it is not the recorded file (its sha256 differs); copy the cache again"
                )
            folder.checked.add(item.path)
        return unpacked

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
