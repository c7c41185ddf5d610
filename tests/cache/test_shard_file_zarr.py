"""Objects are the same to kdcache and to zarr: what one writes the other reads, byte for byte where it can be."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from kdcache.cache import shard_file
from kdcache.cache.shard_file import pack, unpack
from kdcache.errors import CorruptCacheError
from tests.cache.test_shard_file import entries_of, expect, rewrite, values_of
from tests.loops import loop

ROWS = (0, 1, 4095, 4096, 4097, 20_000, 65_537)
SHAPES = [(rows,) for rows in ROWS] + [(rows, width) for rows in ROWS for width in (1, 64)]
SHAPES += [(700, 2000), (1, 2000), (0, 2000), (1100, 1025), (300, 256), (9000, 257), (4097, 0), (0, 0), (5000, 3, 2)]
DTYPES = ("uint8", "int8", "uint16", "uint32", "float16", "float32")


def memory_store(entries: dict[str, bytes]) -> MemoryStore:
    return MemoryStore({key: default_buffer_prototype().buffer.from_bytes(value) for key, value in entries.items()})


def refuse(*_):
    raise AssertionError("the other way of decoding was expected")


@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_reads_and_writes_the_same_bytes(dtype, monkeypatch):
    arrays = {f"positions/{'x'.join(map(str, shape))}": values_of(shape, dtype) for shape in SHAPES}
    entries = entries_of(pack(arrays))
    store = memory_store({key: value for key, value in entries.items() if key.endswith("zarr.json")})
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, values in arrays.items():
            zarr.open_array(store, path=name, mode="r+")[...] = values
    assert {key: value.to_bytes() for key, value in store._store_dict.items()} == entries

    monkeypatch.setattr(shard_file, "_read_array_with_zarr", refuse)
    unpacked = unpack(pack(arrays), expect(arrays), "here")
    for name, values in arrays.items():
        assert unpacked[name].dtype == values.dtype
        np.testing.assert_array_equal(unpacked[name], values, err_msg=name, strict=True)
        np.testing.assert_array_equal(zarr.open_array(store, path=name, mode="r")[...], values)


def test_narrow_columns_and_wide_rows_are_contiguous():
    arrays = {
        "positions/narrow": values_of((9000, 64), "uint8"),
        "positions/fits": values_of((100, 64), "uint8"),
        "positions/wide": values_of((9000, 576), "uint16"),
    }
    unpacked = unpack(pack(arrays), expect(arrays), "here")
    assert unpacked["positions/narrow"].flags.f_contiguous
    assert unpacked["positions/fits"].flags.f_contiguous
    assert unpacked["positions/wide"].flags.c_contiguous


def write_with_zarr(values: np.ndarray, store: MemoryStore | None = None, **settings) -> bytes:
    """Return an object with the array ``positions/a`` as somebody who has only zarr may write it."""
    store = store or MemoryStore()
    blosc = BloscCodec(cname="zstd", clevel=6, shuffle="bitshuffle", typesize=values.dtype.itemsize)
    defaults = {"chunks": (1000, *values.shape[1:]), "compressors": [blosc, Crc32cCodec()], "fill_value": 0}
    group = zarr.create_group(store)
    array = group.create_array("positions/a", shape=values.shape, dtype=values.dtype, **{**defaults, **settings})
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(store, path=array.path, mode="r+")[...] = values
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, value in store._store_dict.items():
            archive.writestr(key, value.to_bytes())
    return buffer.getvalue()


def blosc(**settings) -> dict:
    return {"compressors": [BloscCodec(**{"cname": "zstd", "typesize": 2, **settings}), Crc32cCodec()]}


TRANSPOSED = {"filters": [TransposeCodec(order=(1, 0))]}
LIKE_KDCACHE = {
    "level 9": blosc(clevel=9),
    "level 0": blosc(clevel=0),
    "lz4 in small blocks": blosc(cname="lz4", shuffle="shuffle", blocksize=512),
    "no shuffle": blosc(shuffle="noshuffle"),
    "transposed": TRANSPOSED,
    "one chunk": {**TRANSPOSED, "chunks": (2500, 3)},
    "attributes": {"attributes": {"colour": "green"}},
}
UNLIKE_KDCACHE = {
    "big-endian": {"serializer": BytesCodec(endian="big")},
    "big-endian, transposed": {"serializer": BytesCodec(endian="big"), **TRANSPOSED},
    "transposed by name only": {"filters": [TransposeCodec(order=(0, 1))]},
    "another fill value": {"fill_value": 7},
    "names of dimensions": {"dimension_names": ("position", "rank")},
}


@pytest.mark.parametrize("settings", [*LIKE_KDCACHE, *UNLIKE_KDCACHE])
def test_objects_that_zarr_wrote(settings, monkeypatch):
    values = values_of((2500, 3), "uint16")
    data = write_with_zarr(values, **{**LIKE_KDCACHE, **UNLIKE_KDCACHE}[settings])
    other = "_read_array_with_zarr" if settings in LIKE_KDCACHE else "decode_chunks"
    monkeypatch.setattr(shard_file, other, refuse)
    unpacked = unpack(data, expect({"positions/a": values}), "here")
    np.testing.assert_array_equal(unpacked["positions/a"], values, strict=True)


@loop(("encoding", "separator"), [("default", "."), ("v2", "."), ("v2", "/")])
def test_other_chunk_keys_are_refused_even_beside_the_usual_ones(encoding, separator):
    values = values_of((2500, 3), "uint16")
    usual = entries_of(write_with_zarr(values))
    keys = {"name": encoding, "separator": separator}
    data = rewrite(
        write_with_zarr(values, chunk_key_encoding=keys),
        lambda entries: entries.update({key: value for key, value in usual.items() if "/c/" in key}),
    )
    with pytest.raises(CorruptCacheError, match="here, array positions/a has the chunk key encoding"):
        unpack(data, expect({"positions/a": values}), "here")


def test_without_checking_crc32c_the_arrays_are_the_same():
    arrays = {f"positions/{dtype}{len(shape)}": values_of(shape, dtype) for dtype in DTYPES for shape in SHAPES[-4:]}
    data = pack(arrays)
    checked, unchecked = (unpack(data, expect(arrays), "here", check_crc=check) for check in (True, False))
    for name, values in arrays.items():
        np.testing.assert_array_equal(checked[name], values)
        np.testing.assert_array_equal(unchecked[name], values)
