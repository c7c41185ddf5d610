"""Dumps that are killed: a process that imports everything once and forks a child for every attempt.

Usage: ``python -m tests.dump.crash_server MODE CORPUS OUTPUT SEED NUM_KILLS``. Prints one JSON line per attempt. Mode
``random`` kills from outside at a random instant, most often after the teacher's first batch; ``writing`` lets the
n-th attempt kill itself in the middle of its n-th write, with half of a file on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kdcache.storage import folder
from kdcache.teachers import TeacherOutput
from tests.dump.fake import BigramTeacher, run_dump


def committed(output: Path) -> dict[str, str]:
    """Name and SHA-256 of every file of a committed shard, the record included."""
    files = {}
    for record in sorted((output / "commits").glob("??????.json")):
        names = [item["path"] for item in json.loads(record.read_text())["objects"].values()]
        for name in [f"commits/{record.name}", *names]:
            files[name] = hashlib.sha256((output / name).read_bytes()).hexdigest()
    return files


def kill_in_write(number: int) -> None:
    """Make the ``number``-th write of this process stop half way."""
    calls = itertools.count(1)
    real = folder.os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isfile(f"/proc/self/fd/{descriptor}") and next(calls) == number:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    folder.os.fsync = fsync


#: Most batches of an attempt before it is killed: ten attempts come far, and hardly any of them to the end.
MOST_BATCHES = 8


class SlowTeacher(BigramTeacher):
    """Says on ``pipe`` that it has begun, and takes its time."""

    def __init__(self, pipe: int) -> None:
        super().__init__(delay_s=0.005)
        self.pipe = pipe

    def run(self, sequences: Any, layers: Any = ()) -> TeacherOutput:
        os.write(self.pipe, b"x")
        return super().run(sequences, layers)


def attempt(corpus: Path, output: Path, teacher: BigramTeacher, kill_write: int | None = None) -> int:
    pid = os.fork()
    if pid:
        return pid
    if kill_write is not None:
        kill_in_write(kill_write)
    try:
        run_dump(corpus, output, teacher, layers=(1,), shard_positions=40)
    except BaseException as error:
        print(json.dumps({"error": repr(error)}), flush=True)
        os._exit(1)
    os._exit(0)


def attempt_and_kill(corpus: Path, output: Path, generator: random.Random) -> int:
    reading, writing = os.pipe()
    pid = attempt(corpus, output, SlowTeacher(writing))
    os.close(writing)
    if generator.random() < 0.7:
        # By batches, not by time: however slow or fast the machine, an attempt gets further, but not to the end. The
        # read ends when nothing is left to do.
        for _ in range(generator.randint(1, MOST_BATCHES)):
            os.read(reading, 1)
        time.sleep(generator.uniform(0, 0.01))  # about two batches of `SlowTeacher`
    else:
        time.sleep(generator.uniform(0, 0.1))  # while a dump starts
    os.kill(pid, signal.SIGKILL)
    os.close(reading)
    return pid


def main(mode: str, corpus: Path, output: Path, seed: int, num_kills: int) -> None:
    torch.set_num_threads(1)
    generator = random.Random(seed)
    for number in range(1, num_kills + 1):
        if mode == "writing":
            pid = attempt(corpus, output, BigramTeacher(), number)
        else:
            pid = attempt_and_kill(corpus, output, generator)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps({"killed": os.WIFSIGNALED(status), "committed": committed(output)}), flush=True)
    pid = attempt(corpus, output, BigramTeacher())
    status = os.waitpid(pid, 0)[1]
    print(json.dumps({"exit": os.waitstatus_to_exitcode(status), "committed": committed(output)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
