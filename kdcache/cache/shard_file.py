"""One field of one shard as one immutable object: a Zarr v3 group inside an uncompressed zip.

One object makes publishing atomic on every store, and zarr's own ``ZipStore`` opens it without kdcache. Inside, every
array is split into chunks of rows, each compressed by blosc (zstd) and sealed by crc32c: blosc alone misses nine of
ten flipped bits. The bytes depend on the content only (fixed dates, sorted names), so equal content has equal hashes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from kdcache.errors import CorruptCacheError
from kdcache.schema import ArrayRecord

#: Rows per chunk of narrow arrays; compression does not improve above about 1,000 rows.
CHUNK_ROWS = 4096
#: Wide arrays (hidden states) get fewer rows, so that a chunk stays near 1 MB.
CHUNK_BYTES = 1 << 20
#: The Zarr codecs of an array, outermost first; nothing else is opened.
CODECS = (["bytes", "blosc", "crc32c"], ["transpose", "bytes", "blosc", "crc32c"])


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the object that holds ``arrays``."""
    store = MemoryStore()
    group = zarr.create_group(store)
    for name in sorted(arrays):
        _write_array(group, name, arrays[name])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for key in sorted(store._store_dict):
            archive.writestr(zipfile.ZipInfo(key, date_time=(1980, 1, 1, 0, 0, 0)), store._store_dict[key].to_bytes())
    return buffer.getvalue()


def _write_array(group: zarr.Group, name: str, data: NDArray[Any]) -> None:
    data = np.ascontiguousarray(data)
    width = prod(data.shape[1:]) * data.dtype.itemsize
    # Columns of a narrow array (rank 0 of every position, rank 1, ...) resemble each other, so they are laid together.
    transpose = data.ndim == 2 and width <= 4096
    rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(width, 1), max(len(data), 1)))
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=(rows, *(max(n, 1) for n in data.shape[1:])),
        filters=[TransposeCodec(order=(1, 0))] if transpose else None,
        compressors=[
            BloscCodec(
                cname="zstd",
                clevel=5,
                shuffle="bitshuffle" if transpose or data.ndim == 1 else "shuffle",
                typesize=data.dtype.itemsize,
            ),
            Crc32cCodec(),
        ],
        fill_value=0,
        # Every chunk is written, so that a missing one is damage and never means "all zero".
        config={"write_empty_chunks": True},
    )
    if data.size:
        array[...] = data


def unpack(data: bytes, expected: Mapping[str, tuple[ArrayRecord, int | None]], where: str) -> dict[str, NDArray[Any]]:
    """Read the arrays of an object made by `pack`.

    ``expected`` gives every array's record and number of rows (None where the shard decides, for tables). Shapes and
    dtypes are compared with it before anything is allocated, so a manifest bounds what a stranger's file can cost.
    Raises ``CorruptCacheError`` that names ``where`` and the array.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CorruptCacheError(
                    f"{where} has compressed zip entries; a cache object stores its entries as they are"
                )
            if sum(entry.file_size for entry in archive.infolist()) > len(data):
                raise CorruptCacheError(f"{where} has zip entries that overlap")
            keys = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise CorruptCacheError(f"{where} is not a readable zip: {error}") from None
    result = {}
    for name, (record, num_rows) in expected.items():
        _check_metadata(keys, name, record, num_rows, f"{where}, array {name}")
        result[name] = _read_array(keys, name, f"{where}, array {name}")
    return result


def _read_array(keys: Mapping[str, bytes], name: str, where: str) -> NDArray[Any]:
    prototype = default_buffer_prototype()
    store = MemoryStore(
        {
            key.removeprefix(f"{name}/"): prototype.buffer.from_bytes(value)
            for key, value in keys.items()
            if key.startswith(f"{name}/")
        }
    )
    try:
        array = zarr.open_array(store, mode="r")
        return np.asarray(array[...])
    except Exception as error:  # codecs of blosc and crc32c each raise their own kinds
        raise CorruptCacheError(f"{where} cannot be decoded: {error}") from None


def _check_metadata(
    keys: Mapping[str, bytes], name: str, record: ArrayRecord, num_rows: int | None, where: str
) -> None:
    try:
        metadata = json.loads(keys[f"{name}/zarr.json"])
        shape = [int(size) for size in metadata["shape"]]
        chunks = [int(size) for size in metadata["chunk_grid"]["configuration"]["chunk_shape"]]
        dtype = metadata["data_type"]
        np.dtype(dtype)
        codecs = [codec["name"] for codec in metadata["codecs"]]
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptCacheError(f"{where} has no usable Zarr metadata ({error!r})") from None
    rows = num_rows if num_rows is not None else int(shape[0]) if shape else 0
    if shape != [rows, *record.shape] or dtype != record.dtype:
        wanted = f"{record.dtype} {[rows, *record.shape]}"
        raise CorruptCacheError(f"{where} is {dtype} {shape}, the manifest says {wanted}")
    if num_rows is None and rows > 1 << 24:
        raise CorruptCacheError(f"{where} has {rows} entries, more than any vocabulary")
    if len(chunks) != len(shape) or not 1 <= chunks[0] <= max(rows, 1) or chunks[1:] != list(record.shape):
        raise CorruptCacheError(f"{where} has chunks of {chunks} for the shape {shape}")
    if codecs not in CODECS:
        raise CorruptCacheError(f"{where} has the codecs {codecs}; expected one of {list(CODECS)}")
    num_chunks = -(-rows // chunks[0])
    _check_chunks(keys, name, num_chunks, chunks, np.dtype(dtype).itemsize, where)


def _check_chunks(
    keys: Mapping[str, bytes], name: str, num_chunks: int, chunks: list[int], item_bytes: int, where: str
) -> None:
    chunk_bytes = prod(chunks) * item_bytes
    for number in range(num_chunks):
        data = keys.get(f"{name}/c/{number}" + "/0" * (len(chunks) - 1))
        if data is None:  # Zarr would read it as zeros
            raise CorruptCacheError(f"{where} has no chunk {number} of {num_chunks}")
        # Blosc allocates what bytes 4 to 8 of its header say, so they are compared first.
        if int.from_bytes(data[4:8], "little") != chunk_bytes:
            raise CorruptCacheError(f"{where}: chunk {number} does not hold {chunk_bytes} bytes")
