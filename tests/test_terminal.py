from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import unicodedata

import pytest
from tqdm import tqdm

from kdcache import terminal
from kdcache.table import render_table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x07\x00", r"\x1b[2J\x07\x00"),
        ("a\rb\x08\x7f\x9b", r"a\rb\x08\x7f\x9b"),
        ("a\u202eb\u2066\u200f\u061c", r"a\u202eb\u2066\u200f\u061c"),
        ("\u2028\u2029\ufeff", r"\u2028\u2029\ufeff"),
        ("\udcff", r"\udcff"),
        ("\U000e0041", r"\U000e0041"),
        ("naïve 東京 🙂 \U0001f469\u200d\U0001f4bb שלום \\x1b", "naïve 東京 🙂 \U0001f469\u200d\U0001f4bb שלום \\x1b"),
        ("two\n\tlines", "two\n\tlines"),
    ],
)
def test_what_a_terminal_obeys_becomes_visible(text, shown):
    assert terminal.printable(text) == shown
    assert terminal.printable(shown) == shown
    assert terminal.one_line(text) == shown.replace("\n", r"\n").replace("\t", r"\t")


def test_all_controls_and_marks_of_direction_are_escaped():
    marks = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for character in map(chr, range(sys.maxunicode + 1)):
        is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        if is_control or unicodedata.bidirectional(character) in marks:
            assert (character in terminal.printable(character)) == (character in "\n\t"), hex(ord(character))
            assert character not in terminal.one_line(character), hex(ord(character))


def test_json_is_ascii_and_holds_the_strings_as_they_are(capsys):
    text = "".join(map(chr, (*range(0x180), *range(0x2000, 0x2070), 0xD800, 0xFEFF, 0x1F642, 0xE0041)))
    terminal.echo_json({text: [text]})
    out = capsys.readouterr().out
    assert all(" " <= character <= "~" or character == "\n" for character in out)
    assert json.loads(out) == {text: [text]}


def test_a_row_is_one_line(capsys):
    terminal.echo_rows([("name\n", "a\nfingerprint  0"), ("n", 1)])
    assert capsys.readouterr().out == "name\\n  a\\nfingerprint  0\nn       1\n"

    class Row:
        name = "a\nb"

    assert render_table({"name": ("name", "s")}, [Row()]).splitlines() == ["name", "a\\nb"]


def test_further_lines_of_an_error_are_indented(capsys):
    terminal.echo_error("no such file: x\nEvery byte is as written.")
    assert capsys.readouterr().err == "Error: no such file: x\n  Every byte is as written.\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_no_encoding_is_too_narrow(monkeypatch, encoding):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    with terminal.guarded():
        terminal.echo("é 東 🙂 \udcff")
        print("naïve", "½")
    assert "\\udcff" in buffer.getvalue().decode(encoding)


def test_everything_written_under_guard_is_escaped_but_bars_are_drawn(capsys):
    with terminal.guarded():
        print("print \x1b[2J", file=sys.stderr)
        sys.stderr.writelines(["lines \x07", "\n"])
        with tqdm(range(3), desc="bar \x1b[31m", file=sys.stderr, mininterval=0) as outer:
            for _ in outer:
                for _ in tqdm(range(2), desc="inner", file=sys.stderr, position=1, leave=False, mininterval=0):
                    pass
    err = capsys.readouterr().err
    assert err.startswith("print \\x1b[2J\nlines \\x07\n\rbar \\x1b[31m:   0%")
    assert "\x1b[A" in err
    assert "\x1b" not in err.replace("\x1b[A", "")


def test_streams_are_restored_unless_something_unexpected_is_raised(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    for error, is_expected in ((SystemExit, True), (ZeroDivisionError, False)):
        with contextlib.suppress(error), terminal.guarded():
            assert sys.stdout is not out
            raise error
        assert (sys.stdout is out) == is_expected
    print("\x1b")
    assert out.getvalue() == "\\x1b\n"


def test_a_closed_stream_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with terminal.guarded():
        terminal.echo("nothing")
        for _ in tqdm(range(2)):
            pass


class Failing(io.StringIO):
    """A stream that cannot be written to."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.EPIPE, terminal.OutputClosedError, "^$"),
        (errno.ENOSPC, OSError, "No space left on device: 'standard output'"),
    ],
)
def test_a_stream_that_cannot_be_written_to(monkeypatch, number, error, message):
    monkeypatch.setattr(sys, "stdout", Failing(number))
    monkeypatch.setattr(sys, "stderr", Failing(number))
    with terminal.guarded():
        terminal.echo_error("nobody reads it")  # progress and messages end no command
        with pytest.raises(error, match=message):
            terminal.echo("a result")
