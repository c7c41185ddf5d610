"""JSON lines, and files of one JSON array, read by Python's own parser.

The builder of HF datasets guesses types from blocks of 10 MB and from what strings look like, refuses what does not
fit a guess, and knows a file by its path and time. Here a line is a row, and what it holds is what is read; see
docs/decisions/0029.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from kdcache.corpus.file_bytes import FileBytes, Spool
from kdcache.corpus.record_file import Record, RecordFile, kind_of
from kdcache.errors import CorpusError

_BOM = b"\xef\xbb\xbf"
#: An escape of half a surrogate pair; only a text with one can be no Unicode.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SPACE = " \t\r\n"


def open_json(data: FileBytes, text_field: str, spool: Spool) -> RecordFile:
    """Open a JSON lines file (or one JSON array of objects, whose items are copied into ``spool`` as lines)."""
    with data.opened() as file:
        file.seek(data.start)
        head = file.read(min(data.stop - data.start, 4096)).removeprefix(_BOM).lstrip()
    if head.startswith(b"["):
        lines = spool.add(data.name, (json.dumps(item).encode() + b"\n" for item in _items(data)))
        return RecordFile(lines, text_field, _records(lines, text_field, "item", 0), json.loads)
    return RecordFile(data, text_field, _records(data, text_field, "line", 1), _parsed)


def _records(data: FileBytes, text_field: str, unit: str, first: int) -> Iterator[Record]:
    row = 0
    for number, (start, line) in enumerate(data.lines(), start=first):
        stop = start + len(line)
        if start == data.start and line.startswith(_BOM):
            line, start = line[len(_BOM) :], start + len(_BOM)
        if not line.strip(_SPACE.encode()):
            continue
        place = f"{unit} {number}"
        values = _parse(data.name, number, line.rstrip(b"\r\n"))
        if type(values) is not dict:
            raise CorpusError(
                f'{data.name}, {place} (row {row}): expected a JSON object such as {{"{text_field}": ...}}, '
                f"found {kind_of(values)}"
            )
        if _SURROGATE.search(line):
            _check_unicode(f"{data.name}, {place} (row {row})", values)
        yield Record(place, start, stop, values)
        row += 1


def _items(data: FileBytes) -> Iterator[Any]:
    """Yield the items of a JSON array; the text of the file is in memory, its items are not."""
    text = _decoded(data.name, 1, data.read(data.start, data.stop).removeprefix(_BOM))
    decoder = json.JSONDecoder()
    at = _after_space(text, text.index("[") + 1)
    is_first = True
    while text[at : at + 1] != "]":
        if not is_first:
            if text[at : at + 1] != ",":
                raise _invalid(data.name, 1, json.JSONDecodeError("Expecting ',' or ']'", text, at))
            at = _after_space(text, at + 1)
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _invalid(data.name, 1, error) from None
        yield item
        at, is_first = _after_space(text, at), False
    if (end := _after_space(text, at + 1)) < len(text):
        raise _invalid(data.name, 1, json.JSONDecodeError("Extra data after the array", text, end))


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _parsed(line: bytes) -> dict[str, Any]:
    """Parse a line again."""
    values = json.loads(line.decode("utf-8"))
    if type(values) is not dict:
        raise ValueError("not the line that was found before")
    return values


def _parse(name: str, number: int, line: bytes) -> Any:
    text = _decoded(name, number, line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(name, number, error) from None


def _decoded(name: str, number: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        raise CorpusError(
            f"{name}, line {number} is not UTF-8: byte 0x{data[error.start]:02x}; convert it, e.g. with iconv -t utf-8"
        ) from None


def _invalid(name: str, number: int, error: ValueError | RecursionError) -> CorpusError:
    if isinstance(error, RecursionError):
        return CorpusError(f"{name}, line {number} nests lists or objects too deeply to be read; make it flatter")
    if not isinstance(error, json.JSONDecodeError):
        return CorpusError(f"{name}, line {number} has a number of too many digits; write it as a string")
    return CorpusError(
        f"{name}, line {number + error.lineno - 1}, column {error.colno} is not valid JSON: {error.msg}; "
        "expected one JSON object per line"
    )


def _check_unicode(where: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise CorpusError(
                f"{where}: field {name!a} has an unpaired surrogate (\\ud800-\\udfff), which is no Unicode; "
                "replace it, e.g. with \\ufffd"
            ) from None
