"""Run a sweep: train the students that are missing, a few at a time, then write one table and one plot.

The state of a sweep is in the directories of its students (``kdcache_run.json``, ``sweep_result.json``) and nowhere
else, so nothing can contradict them; ``sweep.json`` and ``table.md`` are made from them every time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from kdcache.errors import ConfigError
from kdcache.json_files import write_json, write_text
from kdcache.progress import bar
from kdcache.sweep.config import PLOT_FILE, SWEEP_FILE, TABLE_FILE, SweepConfig
from kdcache.sweep.plan import SweepPlan, preview_sweep
from kdcache.sweep.pool import devices_of, run_jobs
from kdcache.sweep.results import Outcome, StudentResult, SweepFailure
from kdcache.sweep.table import SweepRow, make_rows, render
from kdcache.sweep.worker import Job, finished_result
from kdcache.train.prepare import started_processes, uses_cpu
from kdcache.words import count


@dataclass(frozen=True)
class SweepResult:
    """The outcome of every student by its name; ``plot`` is None without matplotlib or a finished student."""

    plan: SweepPlan
    outcomes: dict[str, Outcome]
    plot: Path | None

    @property
    def rows(self) -> list[SweepRow]:
        """One row per variation, best first."""
        return make_rows(self.plan, self.outcomes)

    @property
    def failures(self) -> list[SweepFailure]:
        """The students that could not be finished."""
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, SweepFailure)]

    def table(self, *, markdown: bool = False) -> str:
        """Return the table, as aligned text or in Markdown, with notes below."""
        return render(self.plan, self.rows, self.outcomes, markdown=markdown)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types, as ``sweep.json`` has it."""
        return _to_dict(self.plan, self.outcomes)


def sweep_students(config: SweepConfig, *, progress: bool = True) -> SweepResult:
    """Train, evaluate and compare all students of a sweep; finished students are kept.

    A student that fails is reported in the result, and the others go on. Before the first student trains, raises what
    `preview_sweep` raises, and ``ConfigError`` if another sweep is running in the same output directory.
    """
    _check_alone()
    plan = preview_sweep(config, progress=progress)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".sweep.lock", timeout=0):
            outcomes = _train(plan, progress)
            return _finish(plan, outcomes)
    except Timeout:
        raise ConfigError(f"another sweep is running in {output}; wait for it, or choose another output") from None


def _check_alone() -> None:
    if started_processes() > 1:
        raise ConfigError(
            f"{count(started_processes(), 'process')} were started for one sweep; start it without a launcher: it "
            "starts its own processes (jobs)"
        )


def _train(plan: SweepPlan, progress: bool) -> dict[str, Outcome]:
    """Return the outcome of every student, in the order of the plan."""
    jobs = [Job(run.name, run.variation.config, plan.held_out) for run in plan.runs]
    found = {job.name: result for job in jobs if (result := finished_result(job)) is not None}
    tell = _Progress(plan, found, enabled=progress)
    on_gpu = not all(uses_cpu(run.variation.config) for run in plan.runs)
    gpus = devices_of(plan.config.jobs, on_gpu=on_gpu)
    trained: dict[str, Outcome] = dict(found)

    def keep(outcome: Outcome) -> None:
        trained[outcome.name] = outcome
        tell.outcome(outcome)
        write_json(Path(plan.config.output) / SWEEP_FILE, _to_dict(plan, trained))

    try:
        run_jobs(
            [job for job in jobs if job.name not in found],
            num_threads=max(1, torch.get_num_threads() // len(gpus)),
            gpus=gpus,
            on_steps=tell.steps,
            on_outcome=keep,
        )
    finally:
        tell.close()
    return {run.name: trained[run.name] for run in plan.runs}


class _Progress:
    """A progress bar over the steps of all students, and a line for each that is done, on standard error."""

    def __init__(self, plan: SweepPlan, found: Mapping[str, StudentResult], *, enabled: bool) -> None:
        self._enabled = enabled
        self._steps = {run.name: run.steps for run in plan.runs}
        self._done = dict.fromkeys(found, 0)
        self._num_finished = len(found)
        # Steps that were made before do not tell how fast the others will be.
        missing = sum(run.steps for run in plan.runs if run.name not in found)
        self._bar = bar(missing, "sweep", "step", enabled=enabled)
        if found:
            self._write(f"kept {count(len(found), 'student', of=len(plan.runs))}, finished before")

    def steps(self, name: str, steps: int) -> None:
        """Record how many steps a student has made."""
        self._bar.update(steps - self._done.get(name, 0))
        self._done[name] = steps

    def outcome(self, outcome: Outcome) -> None:
        """Record and print the outcome of a student."""
        self.steps(outcome.name, self._steps[outcome.name])
        self._num_finished += 1
        self._write(f"{self._num_finished}/{len(self._steps)} {_line(outcome)}")

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def _write(self, text: str) -> None:
        if self._enabled:
            tqdm.write(text, file=sys.stderr)


def _line(outcome: Outcome) -> str:
    if isinstance(outcome, SweepFailure):
        return f"{outcome.name} failed: {outcome.error}"
    numbers: dict[str, float | None] = {"training loss": outcome.losses.get("loss")}
    if outcome.held_out is not None:
        numbers = {"held-out loss": outcome.held_out.loss, "KL": outcome.held_out.kl, **outcome.held_out.metrics}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items() if value is not None)
    return f"{outcome.name}: {shown}, {outcome.seconds:.1f} s of training"


def _to_dict(plan: SweepPlan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    students = []
    for run in plan.runs:
        outcome = outcomes.get(run.name)
        status = "missing" if outcome is None else "failed" if isinstance(outcome, SweepFailure) else "finished"
        known = {} if outcome is None else outcome.model_dump(mode="json", exclude={"name"})
        described = {name: value for name, value in run.to_dict().items() if name != "state"}
        students.append({**described, "status": status, **known})
    rows = [row.to_dict() for row in make_rows(plan, outcomes)]
    return {"held_out": plan.config.held_out, "rows": rows, "students": students}


def _finish(plan: SweepPlan, outcomes: dict[str, Outcome]) -> SweepResult:
    output = Path(plan.config.output)
    result = SweepResult(plan, outcomes, None)
    write_json(output / SWEEP_FILE, result.to_dict())
    write_text(output / TABLE_FILE, result.table(markdown=True) + "\n")
    if all(row.quality is None for row in result.rows):
        return result
    from kdcache.sweep.plot import write_plot

    quality = result.rows[0].ranked_by
    is_drawn = write_plot(output / PLOT_FILE, result.rows, quality)
    return SweepResult(plan, outcomes, output / PLOT_FILE if is_drawn else None)
