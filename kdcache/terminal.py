r"""What kdcache writes to a terminal: results, errors, warnings, log records and progress bars.

Texts, names and metadata come from corpora, models and caches of strangers. A terminal obeys the control characters in
them: they move the cursor, hide or replace lines, set the title. Bidirectional marks show a text in another order than
it has. So whatever a command writes passes through here, where such characters become visible: ``\x1b``, ``\u202e``.
Nothing is escaped elsewhere: errors and results hold the texts as they are.

`guarded` replaces the standard streams while a command runs, so that what other libraries write is escaped too, and a
character that the terminal's encoding lacks is written as an escape instead of raising. It escapes all but line breaks,
tabs and the two sequences with which tqdm redraws its bars. Inside a line of a table or a list, where a line break
would look like another line of kdcache, use `one_line`.

This module imports nothing heavy: every command starts with it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

#: C0 controls but tab and line feed, DEL and C1 controls.
_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
#: Bidirectional marks, embeddings, overrides and isolates, and the deprecated controls of shaping.
_DIRECTIONS = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
#: Line and paragraph separators, invisible annotations and tags, the byte order mark, and lone surrogates.
_INVISIBLE = r"\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROLS}{_DIRECTIONS}{_INVISIBLE}]")
_UNSAFE_IN_LINE = re.compile(f"[\t\n{_CONTROLS}{_DIRECTIONS}{_INVISIBLE}]")
_SHORT_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
#: tqdm goes to the next or the previous bar with a write of these alone.
_BETWEEN_BARS = re.compile(r"\n*(\x1b\[A)*")


def printable(text: str) -> str:
    r"""Return ``text`` with characters that a terminal obeys or hides as escapes; ``\n`` and ``\t`` stay."""
    return _UNSAFE.sub(_escape, text)


def one_line(text: str) -> str:
    r"""Return ``text`` as `printable` does, with line breaks and tabs as ``\n`` and ``\t`` too."""
    return _UNSAFE_IN_LINE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[match[0]]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def echo(text: str = "", *, err: bool = False) -> None:
    """Write ``text`` and a line break to standard output, or to standard error."""
    stream = sys.stderr if err else sys.stdout
    stream.write(printable(text) + "\n")
    stream.flush()


def echo_error(text: str) -> None:
    """Write an error: further lines are indented, so that they cannot be taken for output of kdcache."""
    echo("Error: " + text.replace("\n", "\n  "), err=True)


def echo_json(data: Any) -> None:
    """Write ``data`` as JSON in ASCII, which holds the strings as they are."""
    # JSON may leave DEL as it is, and json.dumps does.
    echo(json.dumps(data, indent=2, default=str).replace("\x7f", "\\u007f"))


def echo_rows(rows: list[tuple[str, Any]]) -> None:
    """Write aligned ``name  value`` lines."""
    lines = [(one_line(name), one_line(str(value))) for name, value in rows]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        echo(f"{name.ljust(width)}  {value}")


class OutputClosedError(Exception):
    """Whatever read the standard output of a command has closed it.

    No ``OSError``: a broken pipe to a server is something else.
    """


@contextmanager
def guarded() -> Iterator[None]:
    """Escape everything that is written to the standard streams; `OutputClosedError` may be raised.

    After an unexpected error they stay so: Python writes its traceback later.
    """
    _open_missing()
    saved = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _guard(sys.stdout, True), _guard(sys.stderr, False)
    try:
        yield
    except SystemExit:
        _restore(saved)
        raise
    _restore(saved)


def _open_missing() -> None:
    """Let standard streams that are closed lead nowhere.

    Python has None for them, which bars cannot write to; and the next file to be opened would get their number, and
    with it what C libraries write to standard error.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _restore(streams: tuple[TextIO, TextIO]) -> None:
    sys.stdout, sys.stderr = streams
    for stream in streams:
        try:
            stream.flush()
        except OSError:  # Python would try it again at its end, and complain
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _guard(stream: TextIO, holds_results: bool) -> TextIO:
    if isinstance(stream, _Guarded):
        return stream
    return cast(TextIO, _Guarded(stream, holds_results=holds_results))


class _Guarded:
    """A text stream that escapes what is written to it."""

    def __init__(self, stream: TextIO, *, holds_results: bool) -> None:
        self._stream = stream
        self._holds_results = holds_results

    def write(self, text: str) -> int:
        escaped = text if _BETWEEN_BARS.fullmatch(text) else _redrawn(text) or printable(text)
        encoding = self._stream.encoding or "utf-8"
        with self._checked():
            self._stream.write(escaped.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._checked():
            self._stream.flush()

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Say of a failure that it is one of standard output; on standard error it ends no command."""
        try:
            yield
        except BrokenPipeError:
            if self._holds_results:
                raise OutputClosedError from None
        except OSError as error:
            if self._holds_results:
                raise OSError(error.errno, error.strerror, "standard output") from None

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _redrawn(text: str) -> str | None:
    """Return what tqdm writes to draw a bar again: a carriage return, and a part of a line; None for other texts.

    kdcache and the logging module write whole lines, which end with a line break.
    """
    return "\r" + one_line(text[1:]) if text.startswith("\r") and "\n" not in text else None
