"""The parent's side of a sweep: a few spawned processes, each with one student at a time.

An executor of the standard library would not do: when one of its processes is killed (out of memory, usually) it gives
up all work and does not say which student it was. Here that student is named, and a new process takes the others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait

import torch

from kdcache.sweep.results import Outcome, SweepFailure
from kdcache.sweep.worker import Job, serve

#: Seconds that a process gets to end by itself before it is killed.
_GRACE_S = 5.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Worker:
    """A child process and the job that it has, if any; ``gpu`` is the only one that it sees (None: as this process)."""

    def __init__(self, num_threads: int, gpu: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._setup = (num_threads, gpu)
        self.job: Job | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, num_threads))
        with _inherited(gpu):
            self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        """Let the process train another student."""
        self.job = job
        self._send(job)

    def _send(self, job: Job | None) -> None:
        # A process that has died already is noticed, with the name of the job, by `messages`.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(job)

    def replaced(self) -> Worker:
        """End the process and return a new one on the same device."""
        self.end()
        return Worker(*self._setup)

    def end(self) -> None:
        """End the process, in the middle of its job if it has one."""
        if self.job is None:
            self._send(None)
        else:
            self.process.terminate()
        self.process.join(_GRACE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()

    def messages(self) -> Iterator[int | Outcome]:
        """Yield what the process has said since; last, if it has died, the failure of its job."""
        assert self.job is not None
        # Asked before reading: what a process said before it died comes first.
        died = not self.process.is_alive()
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, ConnectionResetError):
            died = True
        if died and self.job is not None:
            self.process.join(_GRACE_S)
            yield SweepFailure(name=self.job.name, error=_how_it_ended(self.process.exitcode), kind="died")


@contextlib.contextmanager
def _inherited(gpu: str | None) -> Iterator[None]:
    """Let a process that is started meanwhile ignore interrupts and see one GPU only."""
    visible, is_main = os.environ.get(_VISIBLE), threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    if gpu is not None:
        os.environ[_VISIBLE] = gpu
    try:
        yield
    finally:
        if gpu is not None:
            os.environ.pop(_VISIBLE)
            os.environ |= {} if visible is None else {_VISIBLE: visible}
        if is_main:
            signal.signal(signal.SIGINT, handler)


def run_jobs(
    jobs: Sequence[Job],
    *,
    num_threads: int,
    gpus: Sequence[str | None],
    on_steps: Callable[[str, int], None] = lambda name, steps: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[str, Outcome]:
    """Train the students of ``jobs`` and return what became of each.

    There is one process per entry of ``gpus`` (None: the CPU), with ``num_threads`` threads. ``on_steps`` is told how
    many steps a student has made, ``on_outcome`` what became of it. Processes are ended before this returns or raises,
    an interrupt included.
    """
    waiting, outcomes = deque(jobs), dict[str, Outcome]()
    workers: list[Worker] = []
    try:
        for gpu in gpus[: len(jobs)]:
            workers.append(Worker(num_threads, gpu))
        while waiting or any(worker.job for worker in workers):
            for worker in workers:
                if worker.job is None and waiting:
                    worker.give(waiting.popleft())
            for worker in _ready(workers):
                outcome = _hear(worker, on_steps)
                if outcome is None:
                    continue
                outcomes[outcome.name] = outcome
                on_outcome(outcome)
                # After a defect nobody knows the state of the process (of its GPU, say).
                if isinstance(outcome, SweepFailure) and outcome.kind != "refused" and waiting:
                    workers[workers.index(worker)] = worker.replaced()
    finally:
        for worker in workers:
            worker.end()
    return outcomes


def _ready(workers: Sequence[Worker]) -> list[Worker]:
    """Return the busy workers that have said something or have died, once there are any."""
    busy = [worker for worker in workers if worker.job is not None]
    ready = set(wait([source for worker in busy for source in (worker.connection, worker.process.sentinel)]))
    return [worker for worker in busy if worker.connection in ready or worker.process.sentinel in ready]


def _hear(worker: Worker, on_steps: Callable[[str, int], None]) -> Outcome | None:
    """Pass on what a worker says; return what became of its job when that is known, which leaves it idle."""
    assert worker.job is not None
    for said in worker.messages():
        if isinstance(said, int):
            on_steps(worker.job.name, said)
            continue
        worker.job = None
        return said
    return None


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = ", which is how a system takes back memory that has run out" if name == "SIGKILL" else ""
        how = f"its process was killed by {name}{memory}"
    else:
        how = f"its process ended with exit code {exit_code}"
    return f"{how}; the same command goes on from its last checkpoint"


def places(num_jobs: int | None, *, on_gpu: bool) -> list[str | None]:
    """Return for every process the GPU that it sees, None for the CPU.

    ``num_jobs`` of None means one process on a CPU and one for every GPU elsewhere; more than GPUs share them.
    """
    if not on_gpu:
        return [None] * (num_jobs or 1)
    listed = os.environ.get(_VISIBLE)
    gpus = listed.split(",") if listed else [str(number) for number in range(torch.cuda.device_count())]
    return [gpus[number % len(gpus)] for number in range(num_jobs or len(gpus))]
