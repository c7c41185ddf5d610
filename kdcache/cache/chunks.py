"""The chunks of one array: how rows are cut, laid out, compressed, checksummed, and read back.

A chunk is what zarr-python would write for the codecs [transpose,] bytes, blosc, crc32c, byte for byte. Doing it here
spares zarr-python's work per chunk (about 0.3 ms, more than decoding takes) and two copies: Blosc decompresses
straight into the result wherever the layouts agree. The columns of a transposed array stay contiguous in the result,
because decoders of top-k arrays work column by column; code that takes single rows of such an array pays for it.

Nothing here reads metadata: callers must have checked that a chunk has this layout and these sizes (`shard_file`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

#: Rows per chunk of arrays of several columns; neither compression nor speed improves above it.
CHUNK_ROWS = 4096
#: Rows per chunk of one-dimensional arrays: 4,096 would make chunks so small that the start of zstd costs most.
CHUNK_ROWS_1D = 65_536
#: Halves have noisy low bits, which zstd compresses up to 10 % better in pieces of at most 16 KB.
CHUNK_ROWS_1D_HALF = 8192
#: Wide arrays (hidden states) get fewer rows, so that a chunk stays near 1 MB.
CHUNK_BYTES = 1 << 20
#: Arrays of at most so many columns (kept ids) are laid out column by column. Hidden states are wider: they would get
#: 3 % smaller at best, and taking the rows of a sequence out of such an array costs thirty times as much.
TRANSPOSE_COLUMNS = 256

#: Every Blosc frame starts with so many bytes: versions, flags, then the sizes of its content, blocks and itself.
BLOSC_HEADER_BYTES = 16
#: What crc32c adds at the end of a chunk.
SEAL_BYTES = 4

# The callers bring threads of their own (loader threads, writers). Left to itself, numcodecs would share Blosc's one
# global pool, under a lock, on the main thread. With False, every call has a context of its own and runs on the thread
# that made it, without the GIL. zarr sets the same when it is imported; the setting holds for the whole process.
numcodecs.blosc.use_threads = False


@dataclass(frozen=True)
class ChunkLayout:
    """How an array is cut into chunks of rows; ``transposed`` chunks hold [columns, rows] instead of [rows, columns].

    Only arrays of two dimensions can be transposed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: int
    transposed: bool

    @classmethod
    def of(cls, data: NDArray[Any]) -> ChunkLayout:
        """Return the layout that kdcache writes ``data`` in."""
        row_bytes = prod(data.shape[1:]) * data.dtype.itemsize
        limit = CHUNK_ROWS
        if data.ndim == 1:
            limit = CHUNK_ROWS_1D_HALF if data.dtype == np.float16 else CHUNK_ROWS_1D
        rows = max(1, min(limit, CHUNK_BYTES // max(row_bytes, 1), max(len(data), 1)))
        # Columns of a narrow array (rank 0 of every position, rank 1, ...) resemble each other: they are laid together.
        transposed = data.ndim == 2 and data.shape[1] <= TRANSPOSE_COLUMNS
        return cls(data.shape, data.dtype.newbyteorder("<"), rows, transposed)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of one chunk of the array, before any transposition (no size is 0)."""
        return (self.rows, *(max(size, 1) for size in self.shape[1:]))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk before compression."""
        return prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """Number of chunks, the last of which may be padded."""
        return 0 if 0 in self.shape else -(-self.shape[0] // self.rows)

    def key(self, number: int) -> str:
        """Return the key of chunk ``number`` below its array."""
        return f"c/{number}" + "/0" * (len(self.shape) - 1)

    @property
    def bitshuffle(self) -> bool:
        """Whether kdcache has Blosc shuffle bits instead of bytes."""
        return self.transposed or len(self.shape) == 1


def encode_chunks(data: NDArray[Any], layout: ChunkLayout) -> Iterator[bytes]:
    """Yield the chunks of ``data``, in order; the last one is filled up with zeros, as zarr does."""
    shuffle = numcodecs.blosc.BITSHUFFLE if layout.bitshuffle else numcodecs.blosc.SHUFFLE
    codec = numcodecs.blosc.Blosc(cname="zstd", clevel=6, shuffle=shuffle)
    chunk, rows_first = _scratch(layout)
    for number in range(layout.num_chunks):
        part = data[number * layout.rows : (number + 1) * layout.rows]
        rows_first[: len(part)] = part
        rows_first[len(part) :] = 0
        frame = bytes(codec.encode(chunk))
        yield frame + google_crc32c.value(frame).to_bytes(SEAL_BYTES, "little")


def decode_chunks(chunks: Sequence[NDArray[np.uint8]], layout: ChunkLayout, *, check_crc: bool = True) -> NDArray[Any]:
    """Return the array whose chunks these are: in Fortran order if they are transposed, else in C order.

    ``sizes_of`` must have been compared with ``layout`` for every chunk. Raises ``ValueError`` naming the chunk whose
    bytes are damaged.
    """
    shape = layout.shape[::-1] if layout.transposed else layout.shape
    base = np.empty(shape, layout.dtype)
    result = base.T if layout.transposed else base
    chunk, rows_first = _scratch(layout)
    for number, data in enumerate(chunks):
        rows = result[number * layout.rows : (number + 1) * layout.rows]
        target = rows.T if layout.transposed else rows
        is_direct = len(rows) == layout.rows and target.flags.c_contiguous
        _open_chunk(data, target if is_direct else chunk, number, check_crc)
        if not is_direct:
            rows[...] = rows_first[: len(rows)]
    return result


def sizes_of(chunk: NDArray[np.uint8]) -> tuple[int, int]:
    """Return two numbers that the header of a chunk's Blosc frame claims: bytes of its content, bytes of the frame."""
    header = chunk[:BLOSC_HEADER_BYTES].tobytes()
    return int.from_bytes(header[4:8], "little"), int.from_bytes(header[12:16], "little")


def _scratch(layout: ChunkLayout) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return room for one chunk as it is stored, and the same memory seen as [rows, ...]."""
    if layout.transposed:
        chunk = np.empty(layout.chunk_shape[::-1], layout.dtype)
        return chunk, chunk.T
    chunk = np.empty(layout.chunk_shape, layout.dtype)
    return chunk, chunk


def _open_chunk(data: NDArray[np.uint8], target: NDArray[Any], number: int, check_crc: bool) -> None:
    frame, seal = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
    # google_crc32c takes any buffer that cannot be resized, as an array is, but declares bytes.
    if check_crc and google_crc32c.value(cast(bytes, frame)) != int.from_bytes(seal.tobytes(), "little"):
        raise ValueError(f"chunk {number} is damaged, its crc32c is not the stored one")
    try:
        numcodecs.blosc.decompress(frame, target)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"chunk {number} is no Blosc frame ({error})") from None
