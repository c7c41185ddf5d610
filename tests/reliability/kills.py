"""Commands are killed, and the same command runs again: nothing that was committed changes, and the result is the same.

Two engines. `EveryOperation`: killed at operation n on a file of the output, for every n. `RandomKills`: killed once to
three times at any instant, by time or when some number of files is there. Then the command runs to its end, and its
output is compared with that of a command that nobody killed.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache.writer import CacheWriter
from tests.reliability.library import Library
from tests.reliability.operations import Operations
from tests.reliability.outside import Surroundings
from tests.reliability.verdicts import Result, Verdict
from tests.reliability.works import Work, committed, difference, fetched, problem_when_killed, works

GROUPS = ("dump", "transcode", "push", "pull", "training")
#: Seconds for which the lease of a killed writer is watched here (20 for users).
_WATCH_S = 0.4


@dataclass(frozen=True)
class _Reference:
    """What a piece of work makes and needs when nobody kills it."""

    output: Path
    num_operations: int
    num_files: int
    seconds: float


class _Kills:
    """What the two engines share: pieces of work, their references, and how attempts are made."""

    limit_s = 240.0
    memory_bytes = None
    handful = 1

    def __init__(self, library: Library, seed: int, bucket: str | None = None) -> None:
        self._seed, self._bucket = seed, bucket
        self._works = works(library, bucket)
        self._references = [
            self._reference(work, library.root / "references" / str(n)) for n, work in enumerate(self._works)
        ]

    def _reference(self, work: Work, output: Path) -> _Reference:
        shutil.rmtree(output, ignore_errors=True)
        operations = Operations(output)
        place = f"{self._bucket}/{output.name}" if work.is_remote else str(output)
        began_s = time.monotonic()
        reading, writing = os.pipe()

        def run() -> None:
            operations.arm()
            work.run(place)
            os.write(writing, str(operations.count).encode())

        log = output.with_name(output.name + "-errors")
        output.parent.mkdir(exist_ok=True)
        status = os.waitstatus_to_exitcode(os.waitpid(start(run, log), 0)[1])
        assert status == 0, f"{work.group} {work.name}: {log.read_text()}"
        seconds = time.monotonic() - began_s
        os.close(writing)
        with os.fdopen(reading) as pipe:
            count = int(pipe.read())
        if work.is_remote:
            fetched(place, output)
        num_files = sum(path.is_file() for path in output.rglob("*"))
        assert (found := difference(work, output, output)) is None, f"{work.group} {work.name}: {found}"
        return _Reference(output, count, num_files, seconds)


class _Attempts:
    """The attempts of one case: what was committed after each, and what went wrong."""

    def __init__(
        self, result: Result, work: Work, reference: _Reference, surroundings: Surroundings, bucket: str | None = None
    ) -> None:
        self.result, self.work, self.reference = result, work, reference
        self._surroundings, self._bucket = surroundings, bucket
        self._output = surroundings.inner / "output"
        self._copy = surroundings.temporary / "copy"
        self._log = surroundings.temporary / "errors"
        self._round = 0
        surroundings.allowed = [self._output]
        self.restart()

    def restart(self) -> None:
        """Begin again with no output."""
        self._before: dict[str, str] = {}
        self._round += 1
        # Objects of a store are left to the store, which ends with the campaign.
        remote = f"{self._bucket}/case-{self.result.case}-{self._round}"
        self._place = remote if self.work.is_remote else str(self._output)
        shutil.rmtree(self._output, ignore_errors=True)
        self._surroundings.changes()

    def start(self, prepare: Callable[[], object] = lambda: None) -> int:
        """Start the command in a process of its own, after ``prepare`` there; return its number."""

        def run() -> None:
            prepare()
            self.work.run(self._place)

        return start(run, self._log)

    def killed(self, pid: int, words: str) -> bool:
        """Wait for a process that was killed, and judge what it left; return whether it had not ended before."""
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGKILL:
            self.result.add(self.work.group, "killed")
        elif status != 0:
            self._fail(f"{words}: it does not run (exit code {status}): {self._last_error()}")
            return False
        self._check(words, is_finished=status == 0)
        return status != 0

    def finish(self, words: str) -> None:
        """Run the command to its end and judge what it has made."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.start(), 0)[1])
        if status != 0:
            self._fail(f"{words}: it does not resume (exit code {status}): {self._last_error()}")
        elif self._check(words, is_finished=True):
            self.result.add(self.work.group, Verdict.WORKED)
        if changed := self._surroundings.changes():
            self.result.add(self.work.group, Verdict.OUTSIDE, f"{self.work.name}, {words}: {changed}")

    def num_files(self) -> int:
        """The files of the output on this disk."""
        return sum(len(files) for _, _, files in os.walk(self._output))

    def _check(self, words: str, *, is_finished: bool) -> bool:
        output = self._output
        try:
            if self.work.is_remote:
                shutil.rmtree(self._copy, ignore_errors=True)
                output = fetched(self._place, self._copy)
            after = committed(self.work, output)
            common = self._before.keys() & after.keys() if self.work.group == "training" else self._before.keys()
            changed = sorted(name for name in common if after.get(name) != self._before[name])
            found = f"committed files changed: {changed}" if changed else None
            self._before = after
            if is_finished:
                found = found or difference(self.work, output, self.reference.output)
            else:
                found = found or problem_when_killed(self.work, output)
        except Exception as error:
            found = f"what is there cannot be judged: {error!r}; {traceback.format_exc().splitlines()[-3:]}"
        if found:
            self._fail(f"{words}: {found}")
        return not found

    def _fail(self, what: str) -> None:
        self.result.add(self.work.group, Verdict.LOST, f"{self.work.name}, {what}")

    def _last_error(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "; ".join(lines[-3:])


def start(run: Callable[[], object], log: Path) -> int:
    """Fork a process that calls ``run`` and writes errors to ``log``; return its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        log.unlink(missing_ok=True)
        # In this process alone: the caller may be one of tests.
        logging.disable(logging.CRITICAL)
        assert CacheWriter.__init__.__kwdefaults__ is not None
        CacheWriter.__init__.__kwdefaults__["watch_s"] = _WATCH_S
        run()
    except BaseException:
        log.write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


class EveryOperation(_Kills):
    """Killed at each operation on a file of the output; case n is one (work, operation), in an order by the seed."""

    name = "operations"

    def __init__(self, library: Library, seed: int) -> None:
        super().__init__(library, seed)
        places = [
            (n, number + 1)
            for n, reference in enumerate(self._references)
            for number in range(reference.num_operations)
        ]
        random.Random(f"{seed} operations").shuffle(places)
        self._places: Sequence[tuple[int, int]] = places

    def __len__(self) -> int:
        """How many cases there are."""
        return len(self._places)

    def prepare(self, work: Path) -> Callable[[int], Result]:
        """Return the function that runs a case in ``work``."""
        surroundings = _enter(work)

        def run(case: int) -> Result:
            generator = random.Random(f"{self._seed} {self.name} {case}")
            index, number = self._places[case]
            output = surroundings.inner / "output"
            attempts = _Attempts(Result(case), self._works[index], self._references[index], surroundings)
            numbers = [number] + ([generator.randint(1, max(2, number // 2))] if generator.random() < 0.3 else [])
            for kill_at in numbers:
                half = generator.random() < 0.7
                attempts.killed(attempts.start(Operations(output, kill_at, half=half).arm), f"operation {kill_at}")
            attempts.finish(f"operations {numbers}")
            return attempts.result

        return run


class RandomKills(_Kills):
    """Killed at random instants; the groups take turns, so cases 0 to 5n - 1 have n of each."""

    name = "kills"

    def prepare(self, work: Path) -> Callable[[int], Result]:
        """Return the function that runs a case in ``work``."""
        surroundings = _enter(work)

        def run(case: int) -> Result:
            generator = random.Random(f"{self._seed} {self.name} {case}")
            group = GROUPS[case % len(GROUPS)]
            index = generator.choice([n for n, item in enumerate(self._works) if item.group == group])
            attempts = _Attempts(Result(case), self._works[index], self._references[index], surroundings, self._bucket)
            num_kills, share = generator.choice([1, 1, 1, 2, 3]), 1.0
            while num_kills and not attempts.result.findings:
                if _kill_at_random(attempts, generator, share):
                    num_kills -= 1
                else:  # it ended before
                    attempts.restart()
                    share *= 0.7
            attempts.finish("after random kills")
            return attempts.result

        return run


def _kill_at_random(attempts: _Attempts, generator: random.Random, share: float) -> bool:
    """Start the command and kill it within that share of its time; return whether it was killed before its end."""
    pid = attempts.start()
    reference = attempts.reference
    if attempts.work.is_remote or generator.random() < 0.6:
        seconds = generator.uniform(0, share * reference.seconds)
        words = f"killed after {seconds:.3f} s"
    else:
        num_files, seconds = generator.randint(1, reference.num_files), generator.uniform(0, 0.02)
        words = f"killed {seconds:.3f} s after file {num_files}"
        while attempts.num_files() < num_files and not _has_ended(pid):
            time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return attempts.killed(pid, words)


def _has_ended(pid: int) -> bool:
    """Whether a process of this one has ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _enter(work: Path) -> Surroundings:
    logging.disable(logging.CRITICAL)
    surroundings = Surroundings(work / "tree")
    surroundings.enter()
    tempfile.tempdir = None  # it was asked for before
    return surroundings
