"""The result of a student in a sweep, stored next to it so that it is trained and evaluated once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from kdcache.config import Config
from kdcache.json_files import write_json

RESULT_FILE = "sweep_result.json"


class HeldOut(Config):
    """The metrics of a student on a held-out cache (see ``kdcache.evaluate``), and the teacher's loss there.

    Losses and KL in nats per position; None where a number is unknown or not finite.
    """

    fingerprint: str
    loss: float | None
    kl: float | None
    agreement: float | None
    ece: float | None
    teacher_loss: float | None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Further metrics of the task; students without a loss are ordered by the first one."""
    warnings: tuple[str, ...] = ()


class StudentResult(Config):
    """A finished student. ``losses`` are means per position over the last logging window of its training, in nats.

    ``seconds`` are those of training; of a run that was interrupted, those of its last part, scaled to all steps.
    ``num_bytes`` are those of the weight files.
    """

    name: str
    steps: int
    losses: dict[str, float | None]
    seconds: float
    tokens_per_s: float
    num_parameters: int
    num_bytes: int | None
    held_out: HeldOut | None = None


class SweepFailure(Config):
    """A student that could not be finished, and why; ``traceback`` only for a defect of kdcache."""

    name: str
    error: str
    traceback: str | None = None
    kind: Literal["refused", "died", "defect"] = "refused"


Outcome = StudentResult | SweepFailure


def write_result(output: str | Path, result: StudentResult) -> None:
    """Write the result of a student into its directory, all or nothing."""
    write_json(Path(output) / RESULT_FILE, result.model_dump())


def read_result(output: str | Path) -> StudentResult | None:
    """Return the result in the directory of a student, None if there is none that can be read."""
    try:
        return StudentResult.model_validate_json((Path(output) / RESULT_FILE).read_text())
    except (OSError, ValidationError):
        return None
