"""Plain text files: one document per file, paragraph or line, byte for byte.

HF datasets has a text builder, but it rewrites line ends, splits paragraphs only at bare LF pairs, and reads whole
files into memory. So kdcache finds the byte range of every document itself and decodes it on request. Only a byte-order
mark is removed. Line mode also drops the line end (LF or CRLF), paragraph mode the blank lines between paragraphs. A
lone CR is an ordinary character.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.corpus.file_bytes import FileBytes
from kdcache.corpus.readers import no_columns
from kdcache.errors import CorpusError

Split = Literal["file", "paragraph", "line"]

_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")
_BLOCK_BYTES = 1 << 24
#: Largest file that may be one document, because a document is read and tokenised whole.
_MAX_DOCUMENT_BYTES = 64 << 20


class TextFile:
    """Documents of one UTF-8 text file.

    Raises ``CorpusError`` where bytes are not UTF-8, and for a file above 64 MB that is to be one document.
    """

    metadata_schema = pa.schema([])

    def __init__(self, data: FileBytes, split: Split) -> None:
        self.name = data.name
        self.is_single = split == "file"
        self._data = data
        if self.is_single:
            _check_size(data)
        # A directory may hold a hundred thousand files: nothing is opened before it is needed, or stays open.
        self._spans_N2 = None if split == "file" else _SPLITTERS[split](data)
        self.num_rows = 1 if self._spans_N2 is None else len(self._spans_N2)

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``."""
        if start >= stop:
            return []
        if self._spans_N2 is None:
            return [self._decode(self._data.read(self._data.start, self._data.stop).removeprefix(_BOM), 0)]
        spans = self._spans_N2[start:stop].tolist()
        first = spans[0][0]
        data = self._data.read(first, spans[-1][1])
        at = first - self._data.start
        return [self._decode(data[begin - first : end - first], begin - first + at) for begin, end in spans]

    def num_missing(self, stop: int) -> int:
        """Return 0: a text file is all text."""
        return 0

    def metadata(self, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Return no columns: a text file has only text."""
        return no_columns(len(rows))

    def values(self, rows: Sequence[int], names: Sequence[str]) -> list[list[Any]]:
        """Return no columns: a text file has only text."""
        return []

    def _decode(self, data: bytes, offset: int) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{self.name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
                f"convert it, e.g. with iconv -t utf-8"
            ) from None


def _check_size(data: FileBytes) -> None:
    size = data.stop - data.start
    if size > _MAX_DOCUMENT_BYTES:
        raise CorpusError(
            f"{data.name} has {size:,} bytes; as one document, which is tokenised in one piece, it may have up to "
            f"{_MAX_DOCUMENT_BYTES:,}. Make every line or paragraph a document with --split-text line or "
            f"--split-text paragraph, or split the file"
        )


def _line_spans(data: FileBytes) -> NDArray[np.int64]:
    """Return [N, 2] byte ranges of the lines, without their ends."""
    start, stop = _text_start(data), data.stop
    if start == stop:
        return np.zeros((0, 2), np.int64)
    with data.mapped() as mapped:
        bytes_B = np.frombuffer(mapped, np.uint8)
        blocks = [(at, min(at + _BLOCK_BYTES, stop)) for at in range(start, stop, _BLOCK_BYTES)]
        newlines = np.concatenate([np.flatnonzero(bytes_B[at:end] == 10) + at for at, end in blocks])
        ends = newlines if bytes_B[stop - 1] == 10 else np.append(newlines, stop)
        begins = np.concatenate([[start], ends[:-1] + 1])
        has_return = (ends > begins) & (bytes_B[np.maximum(ends - 1, 0)] == 13)
        del bytes_B  # the map cannot be closed before
    return np.stack([begins, ends - has_return], axis=1).astype(np.int64)


def _paragraph_spans(data: FileBytes) -> NDArray[np.int64]:
    """Return [N, 2] byte ranges of the runs of non-blank lines."""
    start, stop = _text_start(data), data.stop
    if start == stop:
        return np.zeros((0, 2), np.int64)
    with data.mapped() as mapped:
        gaps = [match.span() for match in _BLANK_LINES.finditer(mapped, start, stop)]
        begins = [start, *(end for _, end in gaps)]
        ends = [*(begin for begin, _ in gaps), stop]
        spans = [_trim(mapped, begin, end) for begin, end in zip(begins, ends, strict=True)]
    return np.array([span for span in spans if span[0] < span[1]], np.int64).reshape(-1, 2)


def _trim(data: mmap.mmap, begin: int, end: int) -> tuple[int, int]:
    """Take line ends off both sides (the first and last paragraph may have one); nothing is left of blank text."""
    while begin < end and data[begin] in b"\r\n":
        begin += 1
    while begin < end and data[end - 1] in b"\r\n":
        end -= 1
    # Only text before the first or after the last gap can be all blanks, and then it is one short line.
    is_blank = (
        data[begin] in b" \t" and data[end - 1] in b" \t" and not data[begin:end].strip() if begin < end else True
    )
    return (begin, begin) if is_blank else (begin, end)


def _text_start(data: FileBytes) -> int:
    has_mark = data.read(data.start, min(data.start + len(_BOM), data.stop)) == _BOM
    return data.start + (len(_BOM) if has_mark else 0)


_SPLITTERS = {"line": _line_spans, "paragraph": _paragraph_spans}
