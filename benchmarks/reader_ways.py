"""The ways of reading that `benchmarks.reader` compares; each reads all sequences once, from cold Python objects.

The other readers get the favourable case: nothing is compressed or checked, and everything is in the page cache after
the first round. (zarr-python is the exception: it reads the cache itself.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import zarr

from kdcache.cache import Cache, epoch_order, open_cache
from kdcache.cache.gather import Piece, RowSpans


@dataclass(frozen=True)
class Way:
    """One row: ``read`` goes through ``num_positions`` positions that take ``num_bytes`` bytes on disk."""

    name: str
    read: Callable[[], object]
    num_positions: int
    num_bytes: float


def ways_of(cache_path: Path, directory: Path, batch: int, num_zarr: int) -> list[Way]:
    """Return all ways to read the cache; the files of the others are written to ``directory``."""
    path = str(cache_path)
    cache = open_cache(path)
    total = cache.manifest.num_positions
    stored = cache.manifest.bytes_per_token * total

    def shuffled(**settings) -> None:
        cache = open_cache(path, **settings)
        for indices in micro_batches(order_of(cache), batch):
            cache.read(indices)

    def in_order() -> None:
        cache = open_cache(path)
        for indices in micro_batches(np.arange(len(cache)), batch):
            cache.read(indices)

    def encoded() -> None:
        cache = open_cache(path)
        for indices in micro_batches(order_of(cache), batch):
            gather(cache, indices)

    def ahead() -> None:
        for _ in open_cache(path).batches(batch, threads=1):
            pass

    def unpack() -> None:
        cache = open_cache(path)
        for shard in range(cache.manifest.num_shards):
            cache._open_shard(shard)

    first = order_of(cache)[:num_zarr].tolist()
    zarr_positions = int(cache.lengths_N[first].sum())
    rows = {
        "read and decode, in order": in_order,
        "read and decode, in the order of an epoch": shuffled,
        "the same, crc32c not checked": lambda: shuffled(check_crc=False),
        "the same, read ahead by a thread": ahead,
        "codes without decoding, in the order of an epoch": encoded,
        "shards unpacked, nothing else": unpack,
    }
    return [
        *(Way(name, read, total, stored) for name, read in rows.items()),
        Way("zarr-python, one call per sequence and array", lambda: read_with_zarr(cache, first), zarr_positions, 0),
        *peers(cache, directory),
    ]


def order_of(cache: Cache) -> np.ndarray:
    return epoch_order(cache.shard_starts, seed=0, epoch=0, key=cache.order_key)


def micro_batches(order: np.ndarray, batch: int) -> list[list[int]]:
    """Split the order into batches as a run of one process does; within a batch, sort by index."""
    return [np.sort(order[n : n + batch]).tolist() for n in range(0, len(order), batch)]


def gather(cache: Cache, indices: list[int]) -> dict[str, np.ndarray]:
    """Return the per-position arrays of some sequences as they are stored."""
    pieces = []
    for index in indices:
        shard = cache.shard_of(index)
        local = np.array([index - cache.shard_starts[shard]])
        pieces.append(Piece(shard, cache._open_shard(shard), local))
    rows = RowSpans.of([piece.arrays.position_offsets_N1 for piece in pieces], [piece.local for piece in pieces])
    arrays = [piece.arrays.fields["targets"].arrays for piece in pieces]
    return {name: rows.gather([one[name] for one in arrays]) for name in position_arrays(cache)}


def position_arrays(cache: Cache) -> list[str]:
    return [array.name for array in cache.manifest.field("targets").arrays if array.rows == "positions"]


def read_with_zarr(cache: Cache, indices: list[int]) -> None:
    """Read every array of every sequence by a call of zarr-python's own, from groups that stay open."""
    records = [array for array in cache.manifest.field("targets").arrays if array.rows == "positions"]
    arrays: dict[int, list[zarr.Array]] = {}
    for index in indices:
        shard = cache.shard_of(index)
        if shard not in arrays:
            store = zarr.storage.ZipStore(cache.folder.local_path / object_path(cache, shard), mode="r")
            group = zarr.open_group(store, mode="r")
            arrays[shard] = [group[record.path] for record in records]
        offsets = cache._open_shard(shard).position_offsets_N1
        local = index - int(cache.shard_starts[shard])
        for array in arrays[shard]:
            array[int(offsets[local]) : int(offsets[local + 1])]


def object_path(cache: Cache, shard: int) -> str:
    return cache.manifest.shards[shard].objects["targets"].path


def peers(cache: Cache, directory: Path) -> list[Way]:
    """Write the same rows for a memory map and for Arrow IPC, and return the ways that read them back."""
    whole = [gather(cache, [index]) for index in range(len(cache))]
    decoded = [cache.read([index]).targets for index in range(len(cache))]
    coded_file, decoded_file = directory / "coded.arrow", directory / "decoded.arrow"
    write_arrow(coded_file, whole)
    write_arrow(decoded_file, [{"ids": t.ids_PK, "logprobs": t.logprobs_PK, "tail": t.log_tail_P} for t in decoded])
    rows = [np.concatenate([bytes_of(array) for array in one.values()], axis=1) for one in whole]
    np.save(directory / "codes.npy", np.concatenate(rows))
    np.save(directory / "offsets.npy", np.cumsum([0, *map(len, rows)]))
    order, total = order_of(cache), sum(map(len, rows))
    offsets = np.load(directory / "offsets.npy").tolist()

    def memory_map() -> None:
        codes = np.load(directory / "codes.npy", mmap_mode="r")
        for index in order.tolist():
            np.array(codes[offsets[index] : offsets[index + 1]])

    return [
        Way("memory map of the codes", memory_map, total, (directory / "codes.npy").stat().st_size),
        Way("Arrow IPC of the codes", lambda: read_arrow(coded_file, order), total, coded_file.stat().st_size),
        Way("Arrow IPC, decoded", lambda: read_arrow(decoded_file, order), total, decoded_file.stat().st_size),
    ]


def bytes_of(array: np.ndarray) -> np.ndarray:
    """Return the rows of an array as bytes, [P, bytes of a row]."""
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)


def write_arrow(path: Path, sequences: list[dict[str, np.ndarray]]) -> None:
    """Write one uncompressed record batch per sequence."""
    batches = [
        pa.RecordBatch.from_arrays([column_of(array) for array in one.values()], names=list(one)) for one in sequences
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def column_of(array: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1]) if array.ndim == 2 else flat


def read_arrow(path: Path, order: np.ndarray) -> None:
    """Copy the columns of one sequence after another out of the mapped file."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for index in order.tolist():
            for column in reader.get_batch(index).columns:
                flat = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
                np.array(flat.to_numpy())
