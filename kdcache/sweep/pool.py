"""The parent process of a sweep: a few spawned processes, each training one student at a time.

An executor of the standard library gives up all work when one of its processes is killed (out of memory, usually), and
does not say which job it had. Here that student is named, and a new process takes the others.
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

#: Seconds after which a process that should end is killed.
_GRACE_S = 5.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Worker:
    """A child process and its job, if any; it sees only the GPU ``gpu`` (None: the same as this process)."""

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
        """Give the process a student to train."""
        self.job = job
        self._send(job)

    def _send(self, job: Job | None) -> None:
        # `messages` notices a process that has died already, and names its job.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(job)

    def replaced(self) -> Worker:
        """End the process and return a new one on the same device."""
        self.end()
        return Worker(*self._setup)

    def end(self) -> None:
        """End the process, even in the middle of a job."""
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
        """Yield the new messages of the process; last, if it has died, the failure of its job."""
        assert self.job is not None
        # Asked before reading: messages from before its death come first.
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
    """Let processes that are started meanwhile ignore interrupts and see one GPU only."""
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
    """Train the students of ``jobs`` and return the outcome of each.

    There is one process per entry of ``gpus`` (None: the CPU), with ``num_threads`` threads. ``on_steps`` is called
    with the steps that a student has made, ``on_outcome`` with its outcome. All processes end before this returns or
    raises, also at an interrupt.
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
                outcome = _receive(worker, on_steps)
                if outcome is None:
                    continue
                outcomes[outcome.name] = outcome
                on_outcome(outcome)
                # After a defect the state of the process (of its GPU, say) is unknown.
                if isinstance(outcome, SweepFailure) and outcome.kind != "refused" and waiting:
                    workers[workers.index(worker)] = worker.replaced()
    finally:
        for worker in workers:
            worker.end()
    return outcomes


def _ready(workers: Sequence[Worker]) -> list[Worker]:
    """Wait for a busy worker that has sent something or has died; return all such workers."""
    busy = [worker for worker in workers if worker.job is not None]
    ready = set(wait([source for worker in busy for source in (worker.connection, worker.process.sentinel)]))
    return [worker for worker in busy if worker.connection in ready or worker.process.sentinel in ready]


def _receive(worker: Worker, on_steps: Callable[[str, int], None]) -> Outcome | None:
    """Pass on the messages of a worker; return the outcome of its job when it is known, which leaves it idle."""
    assert worker.job is not None
    for message in worker.messages():
        if isinstance(message, int):
            on_steps(worker.job.name, message)
            continue
        worker.job = None
        return message
    return None


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = ", usually because memory ran out" if name == "SIGKILL" else ""
        how = f"its process was killed by {name}{memory}"
    else:
        how = f"its process ended with exit code {exit_code}"
    return f"{how}; repeat the command to resume from its last checkpoint"


def devices_of(num_jobs: int | None, *, on_gpu: bool) -> list[str | None]:
    """Return the GPU of every process, None for the CPU.

    ``num_jobs`` of None means one process on a CPU and one for every GPU elsewhere; more processes share the GPUs.
    """
    if not on_gpu:
        return [None] * (num_jobs or 1)
    listed = os.environ.get(_VISIBLE)
    gpus = listed.split(",") if listed else [str(number) for number in range(torch.cuda.device_count())]
    return [gpus[number % len(gpus)] for number in range(num_jobs or len(gpus))]
