"""Run cases in forked children, several at once, each with limits of time and memory.

A child takes a handful of cases, because forking a process that has imported torch takes longer than most of them. It
reports each case on a pipe before it begins the next, so when it is killed, hangs or takes too much memory, the case
is known, and the others of the handful go to another child.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from tests.reliability.verdicts import Result, Verdict


class Engine(Protocol):
    """One kind of cases."""

    name: str
    limit_s: float
    """Seconds that a case may take."""
    memory_bytes: int | None
    """What a child may allocate beyond what it has when it is forked; None: no limit."""
    handful: int
    """Cases of a child."""

    def prepare(self, work: Path) -> Callable[[int], Result]:
        """Return the function that runs a case; it may use the directory ``work``, which is empty, as it likes."""
        ...


class _Child:
    """A forked process and the cases that it has yet to answer."""

    def __init__(self, engine: Engine, cases: list[int], work: Path) -> None:
        self.cases, self.work = deque(cases), work
        self._engine = engine
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self.pipe, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _answer(engine, cases, work, writing)
        os.close(writing)
        self.answer_by_s = time.monotonic() + engine.limit_s
        self.has_ended = False
        self._received = b""

    def results(self) -> Iterator[Result]:
        """Return what has arrived; call when the pipe can be read. Ends the child where nothing more will come."""
        data = os.read(self.pipe, 1 << 20)
        self._received += data
        while len(self._received) >= 8:
            length = int.from_bytes(self._received[:8], "big")
            if len(self._received) < 8 + length:
                break
            message, self._received = self._received[8 : 8 + length], self._received[8 + length :]
            self.answer_by_s = time.monotonic() + self._engine.limit_s
            self.cases.popleft()
            yield pickle.loads(message)
        if not data:
            status = self.end()
            if self.cases:
                yield self._failed(Verdict.TRACEBACK, f"the process ended with {_words_of(status)}")

    def overdue(self) -> Result | None:
        """Return the failure of a child that has hung, and end it; None while it has time."""
        if time.monotonic() < self.answer_by_s:
            return None
        self.end()
        return self._failed(Verdict.HANG, f"no answer in {self._engine.limit_s:.0f} s")

    def end(self) -> int:
        """Kill the child with what it has started, if it still runs; return how it ended."""
        _kill_group(self.pid)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.pipe)
        self.has_ended = True
        return os.waitstatus_to_exitcode(status)

    def _failed(self, verdict: Verdict, what: str) -> Result:
        errors = self.work / "stderr"
        lines = errors.read_text(errors="replace").splitlines() if errors.exists() else []
        result = Result(self.cases.popleft())
        result.add("process", verdict, "; ".join([what, *lines[-3:]]))
        return result


def run_cases(engine: Engine, cases: Iterable[int], *, jobs: int, work: Path) -> Iterator[Result]:
    """Run ``cases``, ``jobs`` at a time, in directories under ``work``; yield the results as they come."""
    waiting = deque(cases)
    children: dict[int, _Child] = {}  # by the number of its directory
    try:
        while waiting or children:
            for slot in range(jobs):
                if slot not in children and waiting:
                    handful = [waiting.popleft() for _ in range(min(engine.handful, len(waiting)))]
                    children[slot] = _Child(engine, handful, work / f"{engine.name}-{slot}")
            readable = select.select([child.pipe for child in children.values()], [], [], 0.25)[0]
            for slot, child in list(children.items()):
                found = list(child.results()) if child.pipe in readable else []
                if not child.has_ended and not found and (failure := child.overdue()):
                    found = [failure]
                yield from found
                if child.has_ended:
                    waiting.extendleft(reversed(child.cases))
                    del children[slot]
    finally:
        for child in children.values():
            if not child.has_ended:
                child.end()


def _answer(engine: Engine, cases: list[int], work: Path, pipe: int) -> None:
    """Be the child: run the cases and report them; never returns."""
    os.setpgid(0, 0)
    faulthandler.disable()  # of pytest: it would write to the streams that pytest has put aside
    try:
        quiet(work / "stderr")
        run = engine.prepare(work)
        if engine.memory_bytes is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + engine.memory_bytes, used + engine.memory_bytes))
        for case in cases:
            message = pickle.dumps(run(case))
            os.write(pipe, len(message).to_bytes(8, "big") + message)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def quiet(log: Path) -> None:
    """Send the standard streams of this process to a file, and give it no input."""
    for number in (1, 2):
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    # pytest and the like may have put something else there.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _words_of(code: int) -> str:
    return f"the signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
