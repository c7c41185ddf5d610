"""Students that differ in one thing: trained from the same start for the same steps, judged on held-out texts.

A *variant* is a cache and settings laid over those that all share. Every variant is trained once per seed; seeds change
what is random (a fresh student's weights, the order of the texts), and within a seed all variants share it, so their
differences are paired. A finished student is judged once and its numbers are kept beside it, so a study that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from kdcache.cache import open_cache
from kdcache.config import build, merge
from kdcache.evaluation import evaluate
from kdcache.train import Distiller, TrainConfig, train_student

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
    """Train and judge every variant with every seed."""
    runs = [(name, seed) for seed in options.seeds for name in variants]
    # Processes, because each student is too small to keep two cores busy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        return dict(zip(runs, pool.map(partial(_one, options, variants), runs), strict=True))


def _one(options: Any, variants: dict[str, Variant], run: tuple[str, int]) -> dict[str, float]:
    """Train and judge one student."""
    torch.set_num_threads(1)
    name, seed = run
    variant = variants[name]
    output = _students(options) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    judged_file = output / "judged.json"
    if judged_file.exists():
        found: dict[str, float] = json.loads(judged_file.read_text())
        return found
    settings = merge(_shared_settings(options, variant.cache, output, seed), variant.settings)
    module = Distiller if variant.make_module is None else variant.make_module()
    result = train_student(build(TrainConfig, settings), resume=True, progress=False, module=module)
    judged = evaluate(options.held_out, [str(output)], device="cpu", progress=False).students[0]
    print(f"{name}, seed {seed}: loss {judged.loss:.4f}, KL {judged.kl:.4f}", flush=True)
    found = {"loss": judged.loss, "kl": judged.kl, "ece": judged.ece, "agreement": judged.agreement}
    found |= {"tokens_per_s": result.tokens_per_s, "steps": result.steps}
    judged_file.write_text(json.dumps(found))
    return found


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
    """Return mean and half width of the 95% interval of Student's t distribution."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    t = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}.get(len(values) - 1, 2.6)
    return f"{mean:.4f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def finish(options: Any, rows: list[dict[str, Any]], results: Results, page: str, name: str) -> None:
    """Show the rows; write JSON and, filling in the template ``page``, ``name`` in the directory of the docs."""
    teacher = evaluate(options.held_out, [], progress=False).teacher
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
    before = evaluate(options.held_out, [options.student], device="cpu", progress=False).students[0]
    return f"trained before, held-out loss {before.loss:.4f} and KL {before.kl:.4f}"


def _students(options: Any) -> Path:
    return Path(options.work) / "students"
