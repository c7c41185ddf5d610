from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kdcache.cli import main


@dataclass
class Outcome:
    """What a user gets to see."""

    code: int
    out: str
    err: str

    def message(self) -> str:
        """The one message of a failure: nothing on standard output, no traceback."""
        assert self.code == 1, (self.code, self.out, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], "one line, and the last one"
        return lines[0].removeprefix("Error: ")


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process, exit code and all."""

    def run_here(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kdcache", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run_here


def run_process(*arguments: object, python: str = sys.executable) -> Outcome:
    """Run a command line as a process of its own."""
    command = [python, "-m", "kdcache", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Outcome(result.returncode, result.stdout, result.stderr)
