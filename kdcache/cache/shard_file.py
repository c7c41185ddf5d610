"""One field of one shard as one immutable object: a Zarr v3 group inside an uncompressed zip.

One object makes publishing atomic on every store, and zarr's own ``ZipStore`` opens it without kdcache. Inside, every
array is split into chunks of rows, each compressed by blosc (zstd) and sealed by crc32c: blosc alone misses nine of
ten flipped bits. The bytes depend on the content only (fixed dates, sorted names), so equal content has equal hashes.

Metadata are always written by zarr-python. Chunks are written and read here (`chunks`), about three times as fast, if
the metadata say exactly what kdcache writes; what other writers may choose (big-endian, say) is left to zarr-python.
"""

from __future__ import annotations

import io
import json
import operator
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.chunks import SEAL_BYTES, ChunkLayout, decode_chunks, encode_chunks, sizes_of
from kdcache.cache.limits import check_decoded, decoded_limit
from kdcache.errors import CorruptCacheError
from kdcache.schema import ArrayRecord

if TYPE_CHECKING:
    import zarr

#: The Zarr codecs of an array, outermost first; nothing else is opened.
CODECS = (["bytes", "blosc", "crc32c"], ["transpose", "bytes", "blosc", "crc32c"])
#: Zarr's data types that an array can have.
DATA_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
#: The only keys that chunks are looked up by; under others, zarr could read chunks that were not checked.
CHUNK_KEYS = {"name": "default", "configuration": {"separator": "/"}}
#: Most rows of a table, which alone decides its length.
MAX_TABLE_ROWS = 1 << 24
#: Fixed part of the header before every entry of a zip; the lengths of name and extra field are its last four bytes.
LOCAL_HEADER_BYTES = 30

Entries = Mapping[str, NDArray[np.uint8]]


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the object that holds ``arrays``."""
    import zarr  # only where shards are written: it takes as long to import as `kdcache inspect` may take in all
    from zarr.storage import MemoryStore

    metadata: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(metadata))
    chunks: dict[str, bytes] = {}
    for name in sorted(arrays):
        layout = ChunkLayout.of(arrays[name])
        _write_metadata(group, name, layout)
        for number, chunk in enumerate(encode_chunks(arrays[name], layout)):
            chunks[f"{name}/{layout.key(number)}"] = chunk
    entries = chunks | {key: value.to_bytes() for key, value in metadata.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for key in sorted(entries):
            archive.writestr(zipfile.ZipInfo(key, date_time=(1980, 1, 1, 0, 0, 0)), entries[key])
    return buffer.getvalue()


def _write_metadata(group: zarr.Group, name: str, layout: ChunkLayout) -> None:
    from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

    group.create_array(
        name,
        shape=layout.shape,
        dtype=layout.dtype,
        chunks=layout.chunk_shape,
        filters=[TransposeCodec(order=(1, 0))] if layout.transposed else None,
        compressors=[
            BloscCodec(
                cname="zstd",
                clevel=6,
                shuffle="bitshuffle" if layout.bitshuffle else "shuffle",
                typesize=layout.dtype.itemsize,
            ),
            Crc32cCodec(),
        ],
        fill_value=0,
    )


def unpack(
    data: bytes,
    expected: Mapping[str, tuple[ArrayRecord, int | None]],
    where: str,
    *,
    check_crc: bool = True,
    most_bytes: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Read the arrays of an object made by `pack`.

    ``expected`` gives every array's record and number of rows (None where the shard decides, for tables). Shapes and
    dtypes are compared with it before anything is allocated, so a manifest bounds what an untrusted file can cost.
    Two-dimensional arrays of few columns come in Fortran order, as they are stored; all others in C order.
    Without ``check_crc`` damage inside a chunk is found only where Blosc stumbles over it, which is seldom.
    Raises ``CorruptCacheError`` that names ``where`` and the array, and ``CacheError`` where all arrays together would
    take more than ``most_bytes`` (default: `kdcache.cache.limits`).
    """
    entries = _read_zip(data, where)
    found = {}
    for name, (record, num_rows) in expected.items():
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
        found[name] = own, *_array_of(own, record, num_rows, f"{where}, array {name}")
    num_bytes = sum(prod(layout.shape) * layout.dtype.itemsize for _, _, layout in found.values())
    check_decoded(num_bytes, decoded_limit(most_bytes), where)
    return {
        name: _read_array(own, metadata, layout, f"{where}, array {name}", check_crc)
        for name, (own, metadata, layout) in found.items()
    }


def _read_zip(data: bytes, where: str) -> Entries:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise CorruptCacheError(f"{where} is not a readable zip: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in found):
        raise CorruptCacheError(f"{where} has compressed zip entries; a cache object stores its entries as they are")
    if sum(entry.file_size for entry in found) > len(data):
        raise CorruptCacheError(f"{where} has zip entries that overlap")
    content = np.frombuffer(data, np.uint8)
    return {entry.filename: _entry(content, entry, where) for entry in found}


def _entry(content: NDArray[np.uint8], entry: zipfile.ZipInfo, where: str) -> NDArray[np.uint8]:
    """Return the bytes of an entry without a copy.

    The zip's own CRC-32 is checked for metadata only: chunks have their crc32c, and other entries are never used.
    """
    start = entry.header_offset + LOCAL_HEADER_BYTES
    header = content[entry.header_offset : start].tobytes()
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    name = content[start : start + name_bytes].tobytes()
    start += name_bytes + extra_bytes
    value = content[start : start + entry.file_size]
    if header[:4] != b"PK\3\4" or name != entry.filename.encode() or len(value) != entry.file_size:
        raise CorruptCacheError(f"{where} is not a readable zip: entry {entry.filename} is not where it should be")
    if entry.filename.endswith("zarr.json") and zlib.crc32(value.data) != entry.CRC:
        raise CorruptCacheError(f"{where} is not a readable zip: entry {entry.filename} is damaged (CRC-32)")
    return value


def _array_of(
    entries: Entries, record: ArrayRecord, num_rows: int | None, where: str
) -> tuple[dict[str, Any], ChunkLayout]:
    """Return the metadata of an array, checked, and what they say of its chunks."""
    try:
        metadata = json.loads(entries["zarr.json"].tobytes())
        layout, codecs = _describe(metadata)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CorruptCacheError(f"{where} has no usable Zarr metadata ({error!r})") from None
    _check_metadata(metadata, layout, codecs, record, num_rows, where)
    return metadata, layout


def _read_array(
    entries: Entries, metadata: dict[str, Any], layout: ChunkLayout, where: str, check_crc: bool
) -> NDArray[Any]:
    chunks = _checked_chunks(entries, layout, where)
    try:
        if _is_written_by_kdcache(metadata, layout):
            return decode_chunks(chunks, layout, check_crc=check_crc)
        return _read_array_with_zarr(entries)
    except Exception as error:  # codecs of zarr each raise their own kinds
        raise CorruptCacheError(f"{where} cannot be decoded: {error}") from None


def _describe(metadata: Any) -> tuple[ChunkLayout, list[str]]:
    """Return what metadata say of an array, unchecked, and the names of its codecs."""
    shape = tuple(operator.index(size) for size in metadata["shape"])
    rows, *others = (operator.index(size) for size in metadata["chunk_grid"]["configuration"]["chunk_shape"])
    codecs = [codec["name"] for codec in metadata["codecs"]]
    if metadata["data_type"] not in DATA_TYPES:
        raise ValueError(f"data type {metadata['data_type']!r}; expected one of {', '.join(DATA_TYPES)}")
    layout = ChunkLayout(shape, np.dtype(metadata["data_type"]).newbyteorder("<"), rows, codecs[:1] == ["transpose"])
    if min(shape) < 0 or others != list(layout.chunk_shape[1:]):
        raise ValueError(f"chunks of {[rows, *others]} for the shape {list(shape)}")
    return layout, codecs


def _check_metadata(
    metadata: Any, layout: ChunkLayout, codecs: list[str], record: ArrayRecord, num_rows: int | None, where: str
) -> None:
    rows = num_rows if num_rows is not None else layout.shape[0]
    if layout.shape != (rows, *record.shape) or metadata["data_type"] != record.dtype:
        found = f"{metadata['data_type']} {list(layout.shape)}"
        raise CorruptCacheError(f"{where} is {found}, the manifest says {record.dtype} {[rows, *record.shape]}")
    if num_rows is None and rows > MAX_TABLE_ROWS:
        raise CorruptCacheError(f"{where} has {rows} entries, more than any vocabulary")
    if not 1 <= layout.rows <= max(rows, 1) or metadata["chunk_grid"].get("name") != "regular":
        raise CorruptCacheError(f"{where} has the chunk grid {metadata['chunk_grid']} for {rows} rows")
    if metadata.get("chunk_key_encoding") != CHUNK_KEYS:
        found = metadata.get("chunk_key_encoding")
        raise CorruptCacheError(f"{where} has the chunk key encoding {found}; expected {CHUNK_KEYS}")
    if codecs not in CODECS:
        raise CorruptCacheError(f"{where} has the codecs {codecs}; expected one of {list(CODECS)}")


def _checked_chunks(entries: Entries, layout: ChunkLayout, where: str) -> list[NDArray[np.uint8]]:
    chunks = []
    for number in range(layout.num_chunks):
        chunk = entries.get(layout.key(number))
        if chunk is None:  # Zarr would read it as zeros
            raise CorruptCacheError(f"{where} has no chunk {number} of {layout.num_chunks}")
        # Blosc allocates what the header says and reads as far as the header says, so both are compared first.
        content_bytes, frame_bytes = sizes_of(chunk)
        if content_bytes != layout.chunk_bytes:
            raise CorruptCacheError(f"{where}: chunk {number} does not hold {layout.chunk_bytes} bytes")
        if frame_bytes != len(chunk) - SEAL_BYTES:
            raise CorruptCacheError(f"{where}: chunk {number} has {len(chunk)} bytes, not {frame_bytes + SEAL_BYTES}")
        chunks.append(chunk)
    return chunks


def _is_written_by_kdcache(metadata: Any, layout: ChunkLayout) -> bool:
    """Whether the metadata are those of `pack` in everything that decides how chunks are decoded."""
    order = [{"name": "transpose", "configuration": {"order": [1, 0]}}] if layout.transposed else []
    single = [{"name": "bytes"}] if layout.dtype.itemsize == 1 else []
    bytes_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *single]
    # Blosc frames describe themselves, so level and shuffle may be any.
    codecs = [{"name": codec["name"]} if codec["name"] == "blosc" else codec for codec in metadata["codecs"]]
    known = {"shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "attributes"}
    return (
        any(codecs == [*order, codec, {"name": "blosc"}, {"name": "crc32c"}] for codec in bytes_codecs)
        and metadata.keys() == known | {"zarr_format", "node_type", "storage_transformers"}
        and (metadata["zarr_format"], metadata["node_type"], metadata["storage_transformers"]) == (3, "array", [])
        and metadata["fill_value"] == 0
    )


def _read_array_with_zarr(entries: Entries) -> NDArray[Any]:
    import zarr
    from zarr.storage import MemoryStore

    store = MemoryStore({key: _zarr_buffer(value.tobytes()) for key, value in entries.items()})
    return np.asarray(zarr.open_array(store, mode="r")[...])


def _zarr_buffer(data: bytes) -> Any:
    """Return ``data`` as the stores of zarr hold it.

    Relies on ``zarr.core.buffer.default_buffer_prototype``, which older versions do not publish elsewhere. Seen in zarr
    3.0.8 to 3.1.6; a canary for it is in tests/test_private_names.py.
    """
    from zarr.core.buffer import default_buffer_prototype

    return default_buffer_prototype().buffer.from_bytes(data)
