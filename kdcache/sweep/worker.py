"""The child process of a sweep: it trains and evaluates one student after another.

One process trains many students, because importing torch and transformers takes seconds. Interrupts are left to the
parent, which ends its children. If the parent dies, they end too: otherwise the next start of the sweep would write to
the same directories.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import TrainerCallback

from kdcache.errors import KdcacheError
from kdcache.evaluate import Evaluation, evaluate_students, weight_bytes
from kdcache.json_files import finite
from kdcache.students.run_file import read_run
from kdcache.sweep.results import HeldOut, Outcome, StudentResult, SweepFailure, read_result, write_result
from kdcache.terminal import guarded
from kdcache.train import Distiller, TrainConfig, TrainResult, train_student

#: Least seconds between two messages about the steps of a student.
_TELL_EVERY_S = 0.5


@dataclass(frozen=True)
class Job:
    """A student to train and to evaluate on the cache ``held_out`` (path and fingerprint), if there is one.

    ``make_module``, which must be picklable, returns what joins student and objective (default: `Distiller`); it is
    called in the process that trains.
    """

    name: str
    config: TrainConfig
    held_out: tuple[str, str] | None = None
    make_module: Callable[[], Any] | None = None


class StepTeller(TrainerCallback):
    """Call ``tell`` with the number of steps done, at most twice a second; ``first`` is where this run began."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._told_s = 0.0
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s = now_s
            self._tell(state.global_step)


def serve(connection: Connection, num_threads: int) -> None:
    """Receive jobs, and send the steps done and then the outcome of each; None and SIGTERM end it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # an orderly exit leaves no semaphore behind
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    with guarded():
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        while (job := connection.recv()) is not None:
            connection.send(_outcome(job, connection.send))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcome(job: Job, tell: Callable[[int], None]) -> Outcome:
    try:
        return train_and_evaluate(job, tell)
    except (KdcacheError, OSError) as error:
        return SweepFailure(name=job.name, error=str(error))
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        return SweepFailure(name=job.name, error=text, traceback=traceback.format_exc(), kind="defect")


def train_and_evaluate(job: Job, tell: Callable[[int], None] = lambda steps: None) -> StudentResult:
    """Train the student of a job, as far as it is not, and evaluate it; ``tell`` gets the steps done so far."""
    known = finished_result(job)
    if known is not None:
        return known
    config, steps = job.config, StepTeller(tell)
    module = Distiller if job.make_module is None else job.make_module()
    trained = train_student(config, resume=True, progress=False, callbacks=[steps], module=module)
    evaluation = None
    if job.held_out is not None:
        evaluation = evaluate_students(job.held_out[0], [config.output], device=config.device, progress=False)
    record = read_run(config.output)
    assert record is not None
    result = StudentResult(
        name=job.name,
        **_training(trained, steps.first),
        num_parameters=record["student"]["num_parameters"],
        num_bytes=weight_bytes(config.output),
        held_out=None if evaluation is None else _held_out(evaluation),
    )
    write_result(config.output, result)
    return result


def finished_result(job: Job) -> StudentResult | None:
    """Return the result of a student that was trained and evaluated on this held-out cache before, else None."""
    result = read_result(job.config.output)
    if result is None:
        return None
    if job.held_out is None:
        # The sweep had a held-out cache then; held-out and training losses must not be ranked together.
        return result.model_copy(update={"held_out": None})
    return result if result.held_out is not None and result.held_out.fingerprint == job.held_out[1] else None


def _training(trained: TrainResult, first_step: int) -> dict[str, Any]:
    done_here = trained.steps - first_step
    scale = trained.steps / done_here if done_here > 0 else 1.0
    return {
        "steps": trained.steps,
        "losses": finite(trained.losses),
        "seconds": trained.seconds * scale,
        "tokens_per_s": trained.tokens_per_s,
    }


def _held_out(evaluation: Evaluation) -> HeldOut:
    student, teacher = evaluation.students[0], evaluation.teacher
    return HeldOut(
        fingerprint=evaluation.fingerprint,
        loss=finite(student.loss),
        kl=finite(student.kl),
        agreement=finite(student.agreement),
        ece=finite(student.ece),
        teacher_loss=finite(teacher.loss),
        metrics=finite(student.metrics),
        warnings=student.warnings,
    )
