from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from kdcache.cache import open_cache
from kdcache.cache.shard_file import pack, unpack
from kdcache.errors import CorruptCacheError
from kdcache.schema import ArrayRecord
from tests.loops import loop

GENERATOR = np.random.default_rng(0)
ARRAYS = {
    "positions/a": GENERATOR.integers(0, 9, (10_000, 3)).astype(np.uint8),
    "positions/wide": GENERATOR.normal(size=(300, 3000)).astype(np.float32),
    "positions/half": GENERATOR.normal(size=10_000).astype(np.float16),
    "positions/zeros": np.zeros((9000, 2), np.uint16),
    "table/ids": np.arange(70_000, dtype=np.uint32),
    "sequences/empty": np.zeros(0, np.uint32),
    "sequences/no_rows": np.zeros((0, 4), np.uint32),
    "positions/one": np.array([[7]], np.uint8),
}


def expect(arrays):
    return {
        path: (
            ArrayRecord(name=path.split("/")[1], dtype=str(a.dtype), rows=path.split("/")[0], shape=a.shape[1:]),
            None if path.startswith("table") else len(a),
        )
        for path, a in arrays.items()
    }


EXPECTED = expect(ARRAYS)
DATA = pack(ARRAYS)


def rewrite(data: bytes, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Open the zip, let ``change`` edit its entries, and write it again properly."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, value in entries.items():
            archive.writestr(name, value)
    return buffer.getvalue()


def sealed(frame: bytes) -> bytes:
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


def edit_metadata(array: str, change: Callable[[dict], None]) -> bytes:
    def edit(entries: dict[str, bytes]) -> None:
        metadata = json.loads(entries[f"{array}/zarr.json"])
        change(metadata)
        entries[f"{array}/zarr.json"] = json.dumps(metadata).encode()

    return rewrite(DATA, edit)


def test_round_trip():
    unpacked = unpack(DATA, EXPECTED, "here")
    for name, values in ARRAYS.items():
        assert unpacked[name].dtype == values.dtype
        np.testing.assert_array_equal(unpacked[name], values, err_msg=name)


def test_equal_content_gives_equal_bytes():
    assert pack(dict(reversed(ARRAYS.items()))) == DATA
    assert pack({name: np.asfortranarray(values) for name, values in ARRAYS.items()}) == DATA
    assert pack({**ARRAYS, "positions/one": np.array([[8]], np.uint8)}) != DATA


def test_constant_arrays_are_written_too():
    with zipfile.ZipFile(io.BytesIO(DATA)) as archive:
        assert sum(name.startswith("positions/zeros/c/") for name in archive.namelist()) == 3


def test_many_threads_unpack_at_once():
    with ThreadPoolExecutor(4) as pool:
        for unpacked in pool.map(lambda _: unpack(DATA, EXPECTED, "here"), range(12)):
            for name, values in ARRAYS.items():
                np.testing.assert_array_equal(unpacked[name], values)


def test_zarr_opens_an_object_without_kdcache(sound):
    cache = open_cache(str(sound))
    for shard in cache.manifest.shards:
        arrays = cache._open_shard(shard.index, ("hidden-1",))
        for field in ("tokens", "targets", "hidden-1"):
            group = zarr.open_group(ZipStore(sound / shard.objects[field].path, mode="r"), mode="r")
            for record in cache.manifest.field(field).arrays:
                np.testing.assert_array_equal(group[record.path][...], arrays.fields[field].arrays[record.name])


def values_of(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.random.default_rng(len(shape)).gamma(1, 20, shape)
    return (values if dtype.startswith("f") else values.clip(0, 127)).astype(dtype)


def entries_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


SMALL = {
    "positions/plain": values_of((40,), "float16"),
    "positions/narrow": values_of((9, 5), "uint8"),
    "positions/wide": values_of((2, 1100), "float32") * 0 + 3,
}
SMALL_DATA = pack(SMALL)


@loop("name", SMALL)
def test_every_flipped_bit_of_a_chunk_is_found(name):
    key = next(key for key in entries_of(SMALL_DATA) if key.startswith(f"{name}/c/"))
    size = len(entries_of(SMALL_DATA)[key])
    start = SMALL_DATA.index(key.encode()) + len(key)
    assert size > 30
    for bit in range(8 * size):
        damaged = bytearray(SMALL_DATA)
        damaged[start + bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptCacheError, match=f"here, array {name}.* chunk 0 "):
            unpack(bytes(damaged), expect(SMALL), "here")


def test_a_flipped_bit_anywhere_is_an_error_or_harmless():
    refused = 0
    for bit in range(0, 8 * len(SMALL_DATA), 37):
        damaged = bytearray(SMALL_DATA)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            unpacked = unpack(bytes(damaged), expect(SMALL), "here")
        except CorruptCacheError:
            refused += 1
        else:
            for name, values in SMALL.items():
                np.testing.assert_array_equal(unpacked[name], values)
    assert refused > 100


def test_damaged_metadata_name_their_entry():
    start = SMALL_DATA.index(b'"attributes": {}')
    damaged = SMALL_DATA[:start] + b'"attributez"' + SMALL_DATA[start + 12 :]
    with pytest.raises(CorruptCacheError, match=r"here is not a readable zip: entry \S+zarr.json is damaged"):
        unpack(damaged, expect(SMALL), "here")


def test_an_entry_that_is_called_otherwise_where_it_stands():
    damaged = SMALL_DATA.replace(b"positions/plain/c/0", b"positions/plane/c/0", 1)
    with pytest.raises(CorruptCacheError, match="entry positions/plain/c/0 is not where it should be"):
        unpack(damaged, expect(SMALL), "here")


CHUNK_CHANGES = {
    "shorter": lambda chunk: chunk[:-1],
    "longer": lambda chunk: chunk + b"0",
    "frame cut": lambda chunk: sealed(chunk[:-9]),
    "frame followed by more": lambda chunk: sealed(chunk[:-4] + b"more"),
    "frame that ends after the chunk": lambda chunk: sealed(chunk[:12] + b"\xff\xff\0\0" + chunk[16:-4]),
    "empty": lambda chunk: b"",
    "five bytes": lambda chunk: b"12345",
    "only a header": lambda chunk: sealed(chunk[:16]),
    "unknown version": lambda chunk: sealed(b"\xee" + chunk[1:-4]),
    "noise": lambda chunk: sealed(chunk[:16] + bytes(255 - byte for byte in chunk[16:-4])),
}


@loop("name", ["positions/a/c/1/0", "positions/half/c/1", "positions/wide/c/0/0"])
@loop("change", CHUNK_CHANGES)
def test_chunks_that_were_made_wrong(name, change):
    data = rewrite(DATA, lambda entries: entries.update({name: CHUNK_CHANGES[change](entries[name])}))
    with pytest.raises(CorruptCacheError, match=f"here, array {name.split('/c/')[0]}.* chunk {name.split('/')[3]} "):
        unpack(data, EXPECTED, "here")


def big_shape(metadata):
    metadata["shape"][0] = 10**13


def big_chunk(metadata):
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [10_000, 10**9]


def negative_shape(metadata):
    metadata["shape"] = [-1, 3]


def no_codecs(metadata):
    metadata["codecs"] = [c for c in metadata["codecs"] if c["name"] not in ("blosc", "crc32c")]


def other_dtype(metadata):
    metadata["data_type"] = "float64"


def unknown_dtype(metadata):
    metadata["data_type"] = "quaternion"


def dtype_that_numpy_parses(metadata):
    metadata["data_type"] = "(1,"


def dtype_of_many(metadata):
    metadata["data_type"] = {"names": ["a"], "formats": ["u1"]}


def gzip_bomb(metadata):
    metadata["codecs"].append({"name": "gzip", "configuration": {"level": 9}})


def text_shape(metadata):
    metadata["shape"] = "lots"


def no_grid(metadata):
    del metadata["chunk_grid"]


def null_codecs(metadata):
    metadata["codecs"] = [None]


def infinite_shape(metadata):
    metadata["shape"][0] = float("inf")


def fractional_shape(metadata):
    metadata["shape"][0] += 0.5


def scalar(metadata):
    metadata["shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"] = []


def other_grid(metadata):
    metadata["chunk_grid"]["name"] = "rectilinear"


def no_keys(metadata):
    del metadata["chunk_key_encoding"]


@pytest.mark.parametrize(
    "change",
    [
        big_shape,
        big_chunk,
        negative_shape,
        no_codecs,
        other_dtype,
        unknown_dtype,
        dtype_that_numpy_parses,
        dtype_of_many,
        gzip_bomb,
        text_shape,
        no_grid,
        null_codecs,
        infinite_shape,
        fractional_shape,
        scalar,
        other_grid,
        no_keys,
    ],
)
def test_lying_metadata_is_refused_before_anything_is_allocated(change, forbid_large_arrays):
    data = edit_metadata("positions/a", change)
    forbid_large_arrays(200 << 20)
    with pytest.raises(CorruptCacheError, match="here, array positions/a") as caught:
        unpack(data, EXPECTED, "here")
    assert "cannot be decoded" not in str(caught.value)  # found from the metadata, not by running out of memory


def test_a_table_decides_its_own_length_but_not_any(forbid_large_arrays):
    forbid_large_arrays(200 << 20)
    with pytest.raises(CorruptCacheError, match="more than any vocabulary"):
        unpack(edit_metadata("table/ids", big_shape), EXPECTED, "here")


def test_a_chunk_that_unpacks_to_more_than_it_may(forbid_large_arrays):
    def edit(entries):
        chunk = bytearray(entries["positions/half/c/0"][:-4])
        chunk[4:8] = (1 << 30).to_bytes(4, "little")
        entries["positions/half/c/0"] = sealed(bytes(chunk))

    data = rewrite(DATA, edit)
    forbid_large_arrays(200 << 20)
    with pytest.raises(CorruptCacheError, match="chunk 0 does not hold 16384 bytes"):
        unpack(data, EXPECTED, "here")


@loop("name", ["positions/a/c/0/0", "positions/a/c/2/0", "positions/a/zarr.json", "table/ids/c/1"])
def test_a_missing_part_is_damage_and_not_zeros(name):
    with pytest.raises(CorruptCacheError, match="here, array " + name.split("/c/")[0].removesuffix("/zarr.json")):
        unpack(rewrite(DATA, lambda entries: entries.pop(name)), EXPECTED, "here")


def test_a_renamed_chunk_is_damage():
    def rename(entries):
        entries["positions/a/c/7/0"] = entries.pop("positions/a/c/0/0")

    with pytest.raises(CorruptCacheError, match="array positions/a"):
        unpack(rewrite(DATA, rename), EXPECTED, "here")


def test_compressed_zip_entries_are_refused(forbid_large_arrays):
    def add(entries):
        entries["bomb"] = bytes(100 << 20)

    data = rewrite(DATA, add, zipfile.ZIP_DEFLATED)
    forbid_large_arrays(50 << 20)
    with pytest.raises(CorruptCacheError, match="here has compressed zip entries"):
        unpack(data, EXPECTED, "here")


@loop("data", [b"", b"PK", b"no zip at all" * 100, DATA[: len(DATA) // 2], DATA[:-10]], ids=len)
def test_no_zip(data):
    with pytest.raises(CorruptCacheError, match="here is not a readable zip"):
        unpack(data, EXPECTED, "here")


def test_an_array_that_the_object_lacks():
    record = ArrayRecord(name="more", dtype="uint8", rows="positions")
    with pytest.raises(CorruptCacheError, match="array positions/more"):
        unpack(DATA, {**EXPECTED, "positions/more": (record, 10_000)}, "here")
