"""Plain text files: one document per file, paragraph or line, byte for byte.

HF datasets has a text builder, but it rewrites line ends, splits paragraphs only at bare LF pairs, and reads whole
files into memory. So kdcache finds the byte range of every document itself and decodes it on request. Only a byte-order
mark is removed. Line mode also drops the line end (LF or CRLF), paragraph mode the blank lines between paragraphs. A
lone CR is an ordinary character. Compressed text files are unsupported; store them as JSON lines.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

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

    def __init__(self, path: Path, split: Split) -> None:
        self.name = str(path)
        self.is_single = split == "file"
        self._path = path
        if self.is_single:
            _check_size(path)
        # A directory may hold a hundred thousand files: nothing is opened before it is needed, or stays open.
        self._spans_N2 = None if split == "file" else _SPLITTERS[split](path)
        self.num_rows = 1 if self._spans_N2 is None else len(self._spans_N2)

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``."""
        if start >= stop:
            return []
        if self._spans_N2 is None:
            return [self._decode(self._path.read_bytes().removeprefix(_BOM), 0)]
        spans = self._spans_N2[start:stop].tolist()
        first = spans[0][0]
        with self._path.open("rb") as file:
            file.seek(first)
            data = file.read(spans[-1][1] - first)
        return [self._decode(data[begin - first : end - first], begin) for begin, end in spans]

    def num_missing(self, stop: int) -> int:
        """Return 0: a text file is all text."""
        return 0

    def metadata(self, rows: Sequence[int]) -> pa.Table:
        """Return no columns: a text file has only text."""
        return no_columns(len(rows))

    def _decode(self, data: bytes, offset: int) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{self.name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
                f"convert it, e.g. with iconv -t utf-8"
            ) from None


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _MAX_DOCUMENT_BYTES:
        raise CorpusError(
            f"{path} has {size:,} bytes; as one document, which is tokenised in one piece, it may have up to "
            f"{_MAX_DOCUMENT_BYTES:,}. Make every line or paragraph a document with --split-text line or "
            f"--split-text paragraph, or split the file"
        )


def _line_spans(path: Path) -> NDArray[np.int64]:
    """Return [N, 2] byte ranges of the lines, without their ends."""
    size = path.stat().st_size
    start = _text_start(path)
    if size == start:
        return np.zeros((0, 2), np.int64)
    data = np.memmap(path, np.uint8, "r")
    blocks = range(start, size, _BLOCK_BYTES)
    newlines = np.concatenate([np.flatnonzero(data[at : at + _BLOCK_BYTES] == 10) + at for at in blocks])
    ends = newlines if data[-1] == 10 else np.append(newlines, size)
    begins = np.concatenate([[start], ends[:-1] + 1])
    has_return = (ends > begins) & (data[np.maximum(ends - 1, 0)] == 13)
    return np.stack([begins, ends - has_return], axis=1).astype(np.int64)


def _paragraph_spans(path: Path) -> NDArray[np.int64]:
    """Return [N, 2] byte ranges of the runs of non-blank lines."""
    size = path.stat().st_size
    start = _text_start(path)
    if size == start:
        return np.zeros((0, 2), np.int64)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        gaps = [match.span() for match in _BLANK_LINES.finditer(data, start)]
        begins = [start, *(end for _, end in gaps)]
        ends = [*(begin for begin, _ in gaps), size]
        spans = [_trim(data, begin, end) for begin, end in zip(begins, ends, strict=True)]
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


def _text_start(path: Path) -> int:
    with path.open("rb") as file:
        return len(_BOM) if file.read(len(_BOM)) == _BOM else 0


_SPLITTERS = {"line": _line_spans, "paragraph": _paragraph_spans}
