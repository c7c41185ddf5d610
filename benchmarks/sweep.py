"""Measure the cost of many students from one cache against plain training and against a live teacher.

The same students, texts and steps are trained three times, equally many in parallel: by `kdcache.sweep` from a cache;
by the Trainer of Hugging Face on cross-entropy, without a teacher; and with the teacher in memory (one student per
process only, because the others would take as long). The times fit the model of when a cache pays off.
"""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import report
from benchmarks.teacher import gguf_path, write_corpus
from kdcache.cache import Cache, open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.losses import TeacherRows
from kdcache.students import StudentConfig, load_student
from kdcache.sweep import SweepConfig, preview_sweep, sweep_students
from kdcache.sweep.pool import run_jobs
from kdcache.sweep.results import SweepFailure
from kdcache.sweep.worker import Job
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.torch_data import to_tensors
from kdcache.train import Distiller, TrainConfig
from kdcache.train.prepare import micro_batches

Seconds = dict[str, float]


class LiveDistiller(Distiller):
    """Distillation on the whole distribution of a teacher that runs in every step, as it is usually written."""

    def __init__(self, student: Any, objective: Any, teacher: Any) -> None:
        super().__init__(student, objective)
        self._teacher = (teacher,)  # in a tuple, so that it is no part of what is trained

    def forward(self, batch: Any, num_valid: Any) -> Any:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        rows = TeacherRows.from_batch(batch)
        with torch.no_grad():
            teacher_BLV = self._teacher[0].model(**inputs, use_cache=False).logits[..., : self.student.vocab_size]
            probs_PV = teacher_BLV.flatten(0, 1)[batch["rows"]].float().softmax(-1)
        student_BLV = self.student.model(**inputs, use_cache=False).logits[..., : self.student.vocab_size]
        logprobs_PV = student_BLV.flatten(0, 1)[batch["rows"]].float().log_softmax(-1)
        kl_P = functional.kl_div(logprobs_PV, probs_PV, reduction="none").sum(-1)
        ce_P = -logprobs_PV.gather(1, rows.labels_P[:, None])[:, 0]
        loss = ((0.9 * kl_P + 0.1 * ce_P) * rows.loss_mask_P).sum() / num_valid
        return loss, {}, int(rows.loss_mask_P.sum())


def live_module(cache: str, teacher: str) -> Any:
    manifest = open_cache(cache).manifest
    config = TeacherConfig(model=teacher, dtype=manifest.teacher.dtype, device="cpu")
    return functools.partial(LiveDistiller, teacher=load_teacher(config, manifest.tokenizer.vocab_size))


_PAGE = (Path(__file__).parent / "costs.md.template").read_text()


def main() -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=gguf_path(), help="hub id, directory or GGUF file")
    parser.add_argument("--documents", type=int, default=40, help="documents of the corpus that are used")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--student-size", default="tiny")
    parser.add_argument("--students", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-sequences", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2, help="students side by side, each with its share of the threads")
    parser.add_argument("--docs", metavar="DIR", help="write costs.md there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        seconds, cache = measure(options, Path(work))
        facts = fit(options, seconds, cache)
        rows = make_rows(options, seconds, cache.manifest.num_positions)
        title = f"{options.students} students ({options.student_size}), {options.epochs} epochs each"
        report.show(title, rows, {"seconds": seconds, "model": facts}, options.json)
        print(f"sweep / bound {facts['ratio']:.3f}; caching pays from {facts['break_even']:.2f} student-epochs on")
        if options.docs:
            write_page(options, Path(options.docs) / "costs.md", rows, facts, cache)


def measure(options: Any, work: Path) -> tuple[Seconds, Cache]:
    """Return the seconds of the dump, of all students from the cache, of all plain ones, and of all live ones."""
    corpus = write_corpus(work / "corpus.jsonl")
    settings = {
        "output": str(work / "cache"),
        "teacher": {"model": options.teacher, "device": "cpu"},
        "corpus": {"paths": [str(corpus)], "limit_documents": options.documents},
        "sequences": {"max_length": options.max_length},
    }
    seconds = {"dump": _timed(lambda: dump_teacher(build(DumpConfig, settings), progress=False))}
    cache = open_cache(str(work / "cache"))
    config = sweep_config(options, work)
    plain, live = (functools.partial(way, options, config) for way in (train_plain, train_live))
    seconds |= {"sweep": _timed(lambda: train_cached(config)), "plain": _timed(plain)}
    # The students of one turn; all others would repeat it.
    seconds["live"] = _timed(live) * options.students / min(options.jobs, options.students)
    return seconds, cache


def _timed(call: Any) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def sweep_config(options: Any, work: Path) -> SweepConfig:
    base = {
        "cache": str(work / "cache"),
        "student": {"size": options.student_size},
        "epochs": options.epochs,
        "batch_sequences": options.batch_sequences,
        "device": "cpu",
        "save_steps": 100_000,
    }
    temperatures = [1 + 0.25 * number for number in range(options.students)]
    grid = {"objective.forward_kl.temperature": temperatures}
    return build(SweepConfig, {"output": str(work / "sweep"), "jobs": options.jobs, "base": base, "grid": grid})


def train_cached(config: SweepConfig) -> None:
    failures = sweep_students(config, progress=False).failures
    assert not failures, failures


def train_live(options: Any, config: SweepConfig) -> None:
    """Train one student per process with the teacher in its memory."""
    module = functools.partial(live_module, config.base["cache"], options.teacher)
    runs = [run.variation for run in preview_sweep(config.model_copy(update={"output": f"{config.output}-live"})).runs]
    jobs = [Job(run.name, run.config, make_module=module) for run in runs[: options.jobs]]
    outcomes = run_jobs(jobs, num_threads=_threads(options), gpus=[None] * options.jobs)
    failed = [outcome for outcome in outcomes.values() if isinstance(outcome, SweepFailure)]
    assert not failed, failed


def train_plain(options: Any, config: SweepConfig) -> None:
    """Train all students on cross-entropy with the stock Trainer, in as many processes."""
    configs = [
        run.variation.config for run in preview_sweep(config.model_copy(update={"output": f"{config.output}-ce"})).runs
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (_threads(options),)) as pool:
        list(pool.map(_train_plain, configs))


def _threads(options: Any) -> int:
    return max(1, torch.get_num_threads() // options.jobs)


def _train_plain(config: TrainConfig) -> None:
    from transformers import Trainer, TrainingArguments

    cache = open_cache(config.cache)
    student = load_student(StudentConfig(size=config.student.size), cache.manifest, cache.tokenizer_dir())
    # The batches of an epoch, ready in memory; the Trainer has nothing to do but to train on them.
    batches = [
        {name: tensors[name] for name in ("input_ids", "attention_mask")}
        | {"labels": tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, -100)}
        for tensors in (to_tensors(cache.read(indices), student.pad_id) for indices in micro_batches(config, cache))
    ]
    arguments = TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=1,
        num_train_epochs=config.epochs or 1,
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(student.model, arguments, data_collator=lambda items: items[0], train_dataset=batches)
    trainer.train()
    trainer.save_model()


def fit(options: Any, seconds: Seconds, cache: Cache) -> dict[str, float]:
    """Return the model's times per 1,000 positions in seconds of the whole machine, and what follows from them."""
    thousands = cache.manifest.num_positions / 1000
    passes = options.students * options.epochs * thousands
    times = {
        "dump": seconds["dump"] / thousands,
        "cached": seconds["sweep"] / passes,
        "student": seconds["plain"] / passes,
        "teacher": (seconds["live"] - seconds["plain"]) / passes,
    }
    saved = times["teacher"] + times["student"] - times["cached"]
    return {
        **{f"t_{name}": value for name, value in times.items()},
        "ratio": (seconds["dump"] + seconds["sweep"]) / (seconds["dump"] + seconds["plain"]),
        "speed_up": seconds["live"] / (seconds["dump"] + seconds["sweep"]),
        # Student-epochs from which on one dump is cheaper than teachers in every step; never, if nothing is saved.
        "break_even": times["dump"] / saved if saved > 0 else float("inf"),
        "bytes_per_position": cache.manifest.bytes_per_token,
    }


def make_rows(options: Any, seconds: Seconds, num_positions: int) -> list[dict[str, Any]]:
    passes = options.students * options.epochs * num_positions
    dump, bound = seconds["dump"], seconds["dump"] + seconds["plain"]
    ways = {
        "kdcache: one dump, then sweep": (dump, seconds["sweep"]),
        "bound: one dump, then plain cross-entropy (HF Trainer)": (dump, seconds["plain"]),
        "teacher live in every step": (0.0, seconds["live"]),
    }
    return [
        {
            "way": name,
            "dump s": f"{before:.1f}",
            "students s": f"{students:.1f}",
            "total s": f"{before + students:.1f}",
            "total / bound": f"{(before + students) / bound:.3f}",
            "tokens/s": passes / students,
        }
        for name, (before, students) in ways.items()
    ]


def write_page(options: Any, path: Path, rows: list[dict[str, Any]], facts: dict[str, float], cache: Cache) -> None:
    columns = list(rows[0])
    cells = [[f"{value:,.0f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    rule = [":--", *["--:"] * (len(columns) - 1)]
    manifest = cache.manifest
    values = {name: f"{value:,.3f}" for name, value in facts.items()}
    path.write_text(
        _PAGE.format(
            **values,
            table="\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *cells)),
            machine=", ".join(f"{key} {value}" for key, value in report.machine().items() if value is not None),
            teacher=f"{Path(manifest.teacher.name).name}, {manifest.teacher.num_parameters:,} parameters",
            positions=f"{manifest.num_positions:,}",
            students=f"{options.students} of size {options.student_size}, {options.epochs} epoch(s), "
            f"{options.batch_sequences} sequences a step, {options.jobs} side by side",
            dense=f"{2 * manifest.tokenizer.vocab_size:,}",
        )
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
