"""Checks for the fast JSON reader: find the line that it cannot parse, and batches whose types it would guess wrongly.

The fast reader reports only that some batch of the file could not be parsed. `check_json` is a slow pass that names the
line; it runs only after a failure. The fast reader also infers types for each batch: a last batch of one row with the
text ``2024-01-01`` becomes a timestamp, and with the text 5 a number, and both are read back as strings that are not in
the file. `safe_batch_bytes` chooses batches that begin with a plain string, which prevents this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcache.errors import CorpusError

_BATCH_BYTES = 10 << 20


def check_json(path: Path, text_field: str) -> int:
    """Return the number of rows; raises ``CorpusError`` naming file, line and row of the first bad one."""
    num_rows = 0
    for place, value in _rows(path):
        where = f"{path}, {place} (row {num_rows})"
        if not isinstance(value, dict):
            raise CorpusError(f'{where}: expected a JSON object such as {{"{text_field}": ...}}, found {_kind(value)}')
        _check_text(where, text_field, value.get(text_field))
        num_rows += 1
    return num_rows


def safe_batch_bytes(path: Path, text_field: str) -> int:
    """Return the smallest usual batch size for which every batch after the first begins with an unmistakable text."""
    num_bytes, size = _BATCH_BYTES, path.stat().st_size
    while num_bytes < size and any(_is_doubtful(line, text_field) for line in _batch_starts(path, num_bytes, size)):
        num_bytes *= 2
    return num_bytes


def _batch_starts(path: Path, num_bytes: int, size: int) -> Iterator[bytes]:
    """Yield the first line of every batch but the first; a batch ends with the line in which it reaches its size."""
    with path.open("rb") as file:
        file.seek(num_bytes)
        while file.readline() and (start := file.tell()) < size:
            yield file.readline()
            file.seek(start + num_bytes)


def _is_doubtful(line: bytes, text_field: str) -> bool:
    try:
        text = json.loads(line)[text_field]
    except (ValueError, TypeError, KeyError):
        return True
    return not isinstance(text, str) or not text or text[0].isdigit()


def _check_text(where: str, text_field: str, text: Any) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise CorpusError(f"{where}: field {text_field!r} must be a string, found {_kind(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CorpusError(f"{where}: field {text_field!r} has an unpaired surrogate (\\ud800-\\udfff)") from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each value with its position in words; the file is JSON lines or one JSON array."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                if line.lstrip().startswith(b"["):
                    items = _parse(path, 1, line + file.read())
                    yield from ((f"item {index}", item) for index, item in enumerate(items))
                    return
            if line.strip():
                yield f"line {number}", _parse(path, number, line.rstrip(b"\r\n"))


def _parse(path: Path, number: int, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}, line {number} is not UTF-8: byte 0x{data[error.start]:02x}; convert it, e.g. with iconv -t utf-8"
        ) from None
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{path}, line {number + error.lineno - 1}, column {error.colno} is not valid JSON: {error.msg}; "
            f"expected one JSON object per line"
        ) from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value}")
