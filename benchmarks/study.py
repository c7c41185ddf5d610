"""Train students that differ in one thing, from the same start for the same steps, and evaluate them on held-out texts.

A *variant* is a cache and settings that override the common ones. Every variant is trained once per seed. The seed
decides a new student's weights and the order of the texts. Within a seed all variants share them, so their differences
are paired. The results of a finished student are stored in its directory, so an interrupted study resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report
from kdcache.cache import open_cache
from kdcache.config import build, merge
from kdcache.evaluate import evaluate_students
from kdcache.sweep.pool import run_jobs
from kdcache.sweep.results import Outcome, StudentResult, SweepFailure
from kdcache.sweep.table import estimate
from kdcache.sweep.worker import Job
from kdcache.train import TrainConfig

Results = dict[tuple[str, int], dict[str, float]]


@dataclass(frozen=True)
class Variant:
    """What one row of a study is trained on: a cache, and settings over those of the study."""

    cache: str
    settings: dict[str, Any] = field(default_factory=dict)
    make_module: Callable[[], Any] | None = None
    """Return what joins student and objective, where that is not the usual; called in the process that trains."""


def arguments(description: str, variants: list[str]) -> argparse.ArgumentParser:
    parser = report.arguments(description)
    parser.add_argument("train", help="finished cache to train on")
    parser.add_argument("held_out", help="finished cache of texts that are not trained on, best of the kind hidden")
    parser.add_argument("--work", required=True, help="directory of caches and students; runs are resumed")
    parser.add_argument("--student", help="a trained student to go on from; quieter than a fresh one")
    parser.add_argument("--student-size", default="tiny", help="of a fresh student, without --student")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-sequences", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--jobs", type=int, default=2, help="students that train side by side, one thread each")
    parser.add_argument("--docs", metavar="DIR", help="write the page there")
    return parser


def run(options: Any, variants: dict[str, Variant]) -> Results:
    """Train and evaluate every variant with every seed; finished students are kept."""
    held_out = (str(options.held_out), open_cache(options.held_out).fingerprint)
    jobs = {
        (name, seed): _job(options, name, variants[name], seed, held_out) for seed in options.seeds for name in variants
    }
    # One thread each, because a student is too small to keep two cores busy.
    outcomes = run_jobs(list(jobs.values()), num_threads=1, gpus=[None] * options.jobs, on_outcome=_tell)
    return {run: _numbers(outcomes[job.name]) for run, job in jobs.items()}


def _job(options: Any, name: str, variant: Variant, seed: int, held_out: tuple[str, str]) -> Job:
    output = _students(options) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    settings = merge(_shared_settings(options, variant.cache, output, seed), variant.settings)
    return Job(f"{name}, seed {seed}", build(TrainConfig, settings), held_out, variant.make_module)


def _tell(outcome: Outcome) -> None:
    if isinstance(outcome, SweepFailure):
        raise SystemExit(f"{outcome.name}: {outcome.traceback or outcome.error}")
    assert outcome.held_out is not None
    print(f"{outcome.name}: loss {outcome.held_out.loss:.4f}, KL {outcome.held_out.kl:.4f}", flush=True)


def _numbers(outcome: Outcome) -> dict[str, float]:
    assert isinstance(outcome, StudentResult)
    judged = outcome.held_out.model_dump(include={"loss", "kl", "ece", "agreement"})
    return judged | {"tokens_per_s": outcome.tokens_per_s, "steps": outcome.steps}


def _shared_settings(options: Any, cache: str, output: Path, seed: int) -> dict[str, Any]:
    return {
        "cache": cache,
        "student": {"model": options.student} if options.student else {"size": options.student_size, "seed": seed},
        "output": str(output),
        "epochs": options.epochs,
        "batch_sequences": options.batch_sequences,
        "learning_rate": options.learning_rate,
        "warmup_ratio": 0.1,
        "seed": seed,
        "device": "cpu",
        "save_steps": 100_000,
    }


def scores(options: Any, results: Results, name: str, reference: str, *, called: str) -> dict[str, Any]:
    """Return the cells of a row: means over the seeds, and paired differences from ``reference`` where that was run."""
    found = [results[name, seed] for seed in options.seeds]
    cells: dict[str, Any] = {key: interval([item[key] for item in found]) for key in ("loss", "kl", "ece")}
    if (reference, options.seeds[0]) in results:
        for key, heading in (("loss", f"loss above {called}"), ("kl", f"KL above {called}")):
            paired = [results[name, seed][key] - results[reference, seed][key] for seed in options.seeds]
            cells[heading] = "-" if name == reference else interval(paired)
    cells["tokens/s"] = statistics.mean(item["tokens_per_s"] for item in found)
    return cells


def interval(values: list[float]) -> str:
    """Return the mean and, of several values, the half width of the 95% interval of Student's t distribution."""
    return f"{estimate(values):.4f}"


def finish(options: Any, rows: list[dict[str, Any]], results: Results, page: str, name: str) -> None:
    """Show the rows; write JSON and, filling in the template ``page``, ``name`` in the directory of the docs."""
    teacher = evaluate_students(options.held_out, [], progress=False).teacher
    title = f"Held-out loss of the teacher: {teacher.loss:.4f}; students after {_epochs(options)}"
    runs = {f"{variant}, seed {seed}": value for (variant, seed), value in results.items()}
    report.show(title, rows, {"runs": runs, "teacher": json.loads(teacher.model_dump_json())}, options.json)
    if options.docs:
        path = Path(options.docs) / name
        path.write_text(page.format(facts=_facts(options, teacher.loss), table=_table(rows)))
        print(f"written to {path}")


def _facts(options: Any, teacher_loss: float) -> str:
    """Return what a page says of the conditions, as the rows of a table."""
    train, held_out = (open_cache(path).manifest for path in (options.train, options.held_out))
    model = json.loads((min(_students(options).iterdir()) / "config.json").read_text())
    facts = {
        "teacher": f"{Path(train.teacher.name).name}, {train.teacher.dtype}; held-out loss {teacher_loss:.4f}",
        "training texts": f"{', '.join(train.corpus.sources)}, {train.num_positions:,} positions, {_epochs(options)}",
        "held-out texts": f"{', '.join(held_out.corpus.sources)}, {held_out.num_positions:,} positions",
        "student": f"{_origin(options)}: {model['architectures'][0]}, width {model['hidden_size']}, "
        f"{model['num_hidden_layers']} layers",
        "steps": f"{options.batch_sequences} sequences a step, AdamW, peak learning rate {options.learning_rate:g}",
        "seeds": f"{', '.join(map(str, options.seeds))}; within a seed all students share initial weights and whatever "
        "else is random",
        "machine": ", ".join(f"{key} {value}" for key, value in report.machine().items() if value is not None),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    cells = [[f"{v:,.0f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, [":--", *["--:"] * (len(columns) - 1)], *cells))


def _epochs(options: Any) -> str:
    return f"{options.epochs:g} {'epoch' if options.epochs == 1 else 'epochs'}"


def _origin(options: Any) -> str:
    if not options.student:
        return f"{options.student_size}, fresh"
    before = evaluate_students(options.held_out, [options.student], device="cpu", progress=False).students[0]
    return f"trained before, held-out loss {before.loss:.4f} and KL {before.kl:.4f}"


def _students(options: Any) -> Path:
    return Path(options.work) / "students"
