"""The bytes of one file of a corpus, by offset: in the file itself, or decompressed in a temporary file.

Documents are read again and again (to check them, to tokenise them, for their metadata), and from the middle. So a
compressed file is decompressed once, into one temporary file for the whole corpus, and read there. Everything else is
read in place. A file that changes between two reads is an error: offsets of another content would give other texts.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from kdcache.errors import CorpusError

_CHUNK_BYTES = 1 << 20


class FileBytes:
    """Bytes ``start`` to ``stop`` of a file; ``name`` is its name in messages, ``path`` None for a temporary file."""

    def __init__(self, name: str, path: Path | None, file: BinaryIO | None, start: int, stop: int) -> None:
        self.name, self.path, self.start, self.stop = name, path, start, stop
        self._file = file
        self._state = None if path is None else _state(path)

    @classmethod
    def of(cls, path: Path) -> FileBytes:
        """Return the bytes of the file at ``path``; it is not held open."""
        return cls(str(path), path, None, 0, path.stat().st_size)

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the file; offsets count from the beginning of the file, so the first one is ``start``.

        Raises ``CorpusError`` if it is no longer the file that was found first.
        """
        if self.path is None:
            assert self._file is not None
            yield self._file
            return
        if _state(self.path) != self._state:
            raise CorpusError(f"{self.name} has changed since the corpus was opened; leave it alone, and begin again")
        with self.path.open("rb") as file:
            yield file

    @contextmanager
    def mapped(self) -> Iterator[mmap.mmap]:
        """Map the file into memory; it must not be empty."""
        with self.opened() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from offset ``start`` to ``stop``."""
        with self.opened() as file:
            file.seek(start)
            return file.read(stop - start)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield every line with its offset; lines end after LF alone."""
        with self.opened() as file:
            file.seek(self.start)
            at = self.start
            while at < self.stop and (line := file.readline(self.stop - at)):
                yield at, line
                at += len(line)


class Spool:
    """One temporary file for the decompressed files of a corpus; it has no name where the system allows it.

    Raises ``CorpusError`` when the directory for temporary files is full or cannot be written.
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None

    def add(self, name: str, chunks: Iterable[bytes]) -> FileBytes:
        """Store ``chunks`` as one file that messages call ``name``."""
        if self._file is None:
            try:
                self._file = tempfile.TemporaryFile(prefix="kdcache-corpus-")  # noqa: SIM115 - for all files
            except OSError as error:
                raise _cannot_write(error) from None
            assert self._file is not None
        start = stop = self._file.seek(0, os.SEEK_END)
        for chunk in chunks:  # which may be read from this very file
            try:
                self._file.seek(stop)
                self._file.write(chunk)
            except OSError as error:
                raise _cannot_write(error) from None
            stop += len(chunk)
        try:
            self._file.flush()  # it is also read as a memory map
        except OSError as error:
            raise _cannot_write(error) from None
        return FileBytes(name, None, self._file, start, stop)


def decompressed(path: Path, compression: str, spool: Spool) -> FileBytes:
    """Decompress the file at ``path`` into ``spool``; raises ``CorpusError`` for a damaged one."""
    return spool.add(str(path), _chunks(path, COMPRESSIONS[compression]))


def _chunks(path: Path, open_file: Callable[[Path], Any]) -> Iterator[bytes]:
    if path.stat().st_size == 0:  # as an empty file is read without compression
        return
    try:
        with open_file(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
            raise
        raise CorpusError(f"cannot decompress {path}: {error}; compress it again, or give it decompressed") from None


def _zstd(path: Path) -> Any:
    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


#: How files are opened that end in an extension of compression.
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".zst": _zstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _cannot_write(error: OSError) -> CorpusError:
    return CorpusError(
        f"cannot write the temporary file of decompressed texts in {tempfile.gettempdir()}: "
        f"{error.strerror or error}; set TMPDIR to a directory with more room"
    )
