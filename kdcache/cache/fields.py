"""The fields of an open cache: built from its manifest, and checked against it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from kdcache.cache import layout
from kdcache.errors import CacheError, ConfigError, CorruptCacheError
from kdcache.fields import FieldKind, known_fields
from kdcache.schema import Manifest
from kdcache.storage.folder import Folder


def open_fields(folder: Folder, manifest: Manifest) -> dict[str, FieldKind]:
    """Return the fields of a cache by name, without those whose kind is not installed here.

    Raises ``CacheError`` for an unknown codec, ``CorruptCacheError`` where a field lacks an array that reading it needs
    (a manifest may come from a stranger).
    """
    where = f"{folder}/{layout.MANIFEST}"
    try:
        fields = known_fields(manifest)
    except ConfigError as error:
        raise CacheError(f"{where}: {error} If it was written by a newer kdcache, install it") from None
    for field in fields.values():
        _check_arrays(field, f"{where}: field {field.name}")
    return fields


def _check_arrays(field: FieldKind, where: str) -> None:
    found = {array.name: array for array in field.record.arrays}
    for array in field.arrays():
        if array.name not in found:
            raise CorruptCacheError(f"{where} lacks the array {array.name!r}")
        if found[array.name] != array:
            raise CorruptCacheError(f"{where} has the array {found[array.name]}, its codec makes {array}")


def field_named(fields: Mapping[str, FieldKind], manifest: Manifest, name: str) -> FieldKind:
    """Return the field called ``name``.

    Raises ``CacheError`` where the cache has no such field, or its kind is not installed.
    """
    if name in fields:
        return fields[name]
    record = layout.field_of(manifest, name)
    raise CacheError(
        f"field {name!r} is of the kind {record.kind!r}, which is not installed; install the package that adds it"
    )


def encoded_bytes(manifest: Manifest) -> dict[str, int]:
    """Return about how many bytes every field takes in memory, encoded, over all shards."""
    counts: Counter[str] = Counter({"table": manifest.num_shards})
    for shard in manifest.shards:
        counts.update(shard.num_rows)
    return {
        field.name: sum(counts[a.rows] * math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in field.arrays)
        for field in manifest.fields
    }
