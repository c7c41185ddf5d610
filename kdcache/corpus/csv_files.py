"""CSV and TSV files: the first line names the columns, all values are strings as they are written.

Such files have no types, so none is guessed: ``007``, ``1e3`` and ``2020-01-01`` stay what they are, and what reads a
label makes a number of it. An empty value is null. Quotes are ``"``, doubled inside quotes, and a quoted value may
contain line ends. A file that does not keep to this is refused with its line rather than read otherwise.
"""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kdcache.corpus.file_bytes import FileBytes
from kdcache.corpus.record_file import Record, RecordFile
from kdcache.errors import CorpusError

_BOM = b"\xef\xbb\xbf"
#: The longest value is a setting of the whole process.
_LIMIT = threading.RLock()


def open_csv(data: FileBytes, text_field: str, separator: str) -> RecordFile:
    """Open a file whose values are separated by ``separator``."""
    rows = _rows(data, separator)
    _, _, _, names = next(rows, (0, 0, 0, list[str]()))
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise CorpusError(f"{data.name}, line 1 has two columns called {repeated!r}; give them different names")
    if names and text_field not in names and len(names) == 1 and any(c in names[0] for c in ",;\t|"):
        raise CorpusError(
            f"{data.name}, line 1: expected names of columns separated by {separator!r}, found {names[0][:60]!r}"
        )

    def records() -> Iterator[Record]:
        for number, start, stop, values in rows:
            if len(values) != len(names):
                raise CorpusError(
                    f"{data.name}, line {number} has {len(values)} values, and line 1 names {len(names)} columns; "
                    "put values that contain separators or line ends in double quotes"
                )
            yield Record(f"line {number}", start, stop, _named(names, values))

    return RecordFile(data, text_field, records(), _parser(names, separator))


def _parser(names: list[str], separator: str) -> Callable[[bytes], dict[str, Any]]:
    def parse(data: bytes) -> dict[str, Any]:
        with _long_values():
            # Lines end after LF alone, as when the file was opened.
            lines = [line + "\n" for line in data.decode("utf-8").removesuffix("\n").split("\n")]
            [values] = [row for row in csv.reader(lines, delimiter=separator, strict=True) if row]
        return _named(names, values)

    return parse


def _named(names: list[str], values: list[str]) -> dict[str, Any]:
    return {name: value or None for name, value in zip(names, values, strict=True)}


def _rows(data: FileBytes, separator: str) -> Iterator[tuple[int, int, int, list[str]]]:
    """Yield the number of the first line, the offsets and the values of every row, the names of columns first."""
    end, number = data.start, 0

    def lines() -> Iterator[str]:
        nonlocal end, number
        for start, line in data.lines():
            end, number = start + len(line), number + 1
            try:
                yield (line.removeprefix(_BOM) if start == data.start else line).decode("utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{data.name}, line {number} is not UTF-8: byte 0x{line[error.start]:02x}; convert it, e.g. with "
                    "iconv -t utf-8"
                ) from None

    reader = csv.reader(lines(), delimiter=separator, strict=True)
    while True:
        start, first = end, number + 1
        try:
            with _long_values():
                row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise CorpusError(
                f"{data.name}, line {first}: not a table of values separated by {separator!r} ({error}); check its "
                "quotes"
            ) from None
        if row:  # else a blank line
            yield first, start, end, row


@contextmanager
def _long_values() -> Iterator[None]:
    """Let values be as long as they are; by default 131,072 characters is the limit, for all users of the module."""
    with _LIMIT:
        before = csv.field_size_limit((1 << 31) - 1)
        try:
            yield
        finally:
            csv.field_size_limit(before)
