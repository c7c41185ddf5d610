"""Does the student get as good from a cache as with the teacher live, and for how many bytes?

One student, one order of the texts, the same steps; only the targets differ. Everything comes from one dump of the
kind hidden: `transcode` makes the smaller caches from it. All students are judged on a held-out cache of the kind
hidden, so their KL to the teacher is the exact one over the whole vocabulary. Seeds change initial weights and order;
within a seed all variants share both, so the differences to the live teacher are paired.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.teacher import gguf_path
from kdcache.cache import open_cache
from kdcache.config import build, merge
from kdcache.evaluation import evaluate
from kdcache.losses import TeacherRows
from kdcache.presets import PRESETS
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.train import Distiller, TrainConfig, train_student
from kdcache.transcode import TranscodeConfig, transcode_cache

_KL: dict[str, Any] = {"forward_kl": {"weight": 1.0}, "cross_entropy": {"weight": 0.0}}


def _tail(name: str) -> dict[str, Any]:
    return {"forward_kl": {"weight": 1.0, "tail": name}, "cross_entropy": {"weight": 0.0}}


#: Variant -> (preset of the cache, objective, whether the teacher is in memory).
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "live teacher, full KL": ("hidden", _KL, True),
    "hidden (exact mode)": ("hidden", _KL, False),
    "hidden-int8": ("hidden-int8", _KL, False),
    "compact, bucket": ("compact", _tail("bucket"), False),
    "compact, prior": ("compact", _tail("prior"), False),
    "compact-32, prior": ("compact-32", _tail("prior"), False),
    "ragged, bucket": ("ragged", _tail("bucket"), False),
    "sampled": ("sampled", _KL, False),
    "hybrid": ("hybrid", _KL, False),
    "hybrid-16": ("hybrid-16", _KL, False),
    "compact, uniform": ("compact", _tail("uniform"), False),
    "compact, renormalised": ("compact", _tail("renormalise"), False),
    "compact, drop": ("compact", _tail("drop"), False),
    "cross-entropy only": ("hidden", {"forward_kl": None, "cross_entropy": {"weight": 1.0}}, False),
}
LIVE = "live teacher, full KL"


class LiveDistiller(Distiller):
    """The same student and objective with the teacher's last hidden states made on the spot."""

    def __init__(self, student: Any, objective: Any, teacher: Any) -> None:
        super().__init__(student, objective)
        self._teacher = (teacher,)  # in a tuple, so that it is no part of what is trained

    def forward(self, batch: Any, num_valid: Any) -> Any:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        with torch.no_grad():
            states = self._teacher[0].model.base_model(**inputs, use_cache=False).last_hidden_state
        rows = {**batch, "teacher_hidden": states.flatten(0, 1)[batch["rows"]].float()}
        hidden_PD = self.student.hidden(batch)
        result = self.objective(hidden_PD, self.student.head, TeacherRows.from_batch(rows), num_valid)
        return result.loss, result.sums, result.num_valid


_PAGE = """# Students from a cache beside the live teacher

Written by `python -m benchmarks.students TRAIN HELD_OUT --work DIR --docs docs`, where both caches were made by
`kdcache dump-teacher --preset hidden`; do not edit it by hand.

| | |
|---|---|
| teacher | {teacher} |
| training texts | {train} |
| held-out texts | {held_out} |
| student | {student} |
| steps | {steps} |
| seeds | {seeds}; within a seed all students share initial weights and the order of the texts |
| machine | {machine} |

{table}

- *loss*, *KL* and *ECE* on the held-out texts; KL is that of the whole vocabulary. Means over the seeds with the half
  width of their 95 % interval (Student's t). *loss above live* and *KL above live*: the same for the paired differences
  from the student with the live teacher, same seed.
- *bytes/token* of the cache on disk, token ids, scalars and tables included.
- *tokens/s* of training, one thread each, two students side by side on a shared machine.
- All but the last row train on forward KL alone; none has a cross-entropy term, so that the targets are what differs.
"""


def main() -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("train", help="finished cache of the kind hidden, to train on")
    parser.add_argument("held_out", help="finished cache of the kind hidden, of texts that are not trained on")
    parser.add_argument("--work", required=True, help="directory of transcoded caches and students; runs are resumed")
    parser.add_argument("--teacher", default=gguf_path(), help="the caches' teacher, for the live variant")
    parser.add_argument("--student", help="a trained student to go on from; quieter than a fresh one")
    parser.add_argument("--student-size", default="tiny", help="of a fresh student, without --student")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-sequences", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=2, help="students that train side by side, one thread each")
    parser.add_argument("--docs", metavar="DIR", help="write students.md there")
    options = parser.parse_args()
    for preset in dict.fromkeys(VARIANTS[name][0] for name in options.variants):
        make_cache(options, preset)
    runs = [(name, seed) for seed in options.seeds for name in options.variants]
    # Processes, because each student is too small to keep two cores busy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        results = dict(zip(runs, pool.map(partial(one, options), runs), strict=True))
    rows = [row(options, name, results) for name in options.variants]
    finish(options, rows, {f"{name}, seed {seed}": value for (name, seed), value in results.items()})


def cache_path(options: Any, preset: str) -> str:
    return options.train if preset == "hidden" else str(Path(options.work) / "caches" / preset)


def make_cache(options: Any, preset: str) -> None:
    if preset != "hidden":
        places = {"source": options.train, "output": cache_path(options, preset)}
        settings = merge({**places, "hidden_states": {"layers": []}}, PRESETS[preset].settings)
        transcode_cache(build(TranscodeConfig, settings), progress=False)


def one(options: Any, run: tuple[str, int]) -> dict[str, float]:
    """Train and judge one student."""
    torch.set_num_threads(1)
    name, seed = run
    preset, objective, live = VARIANTS[name]
    output = Path(options.work) / "students" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    judged_file = output / "judged.json"
    if judged_file.exists():
        found: dict[str, float] = json.loads(judged_file.read_text())
        return found
    settings = {
        "cache": cache_path(options, preset),
        "student": {"model": options.student} if options.student else {"size": options.student_size, "seed": seed},
        "output": str(output),
        "objective": objective,
        "epochs": options.epochs,
        "batch_sequences": options.batch_sequences,
        "learning_rate": options.learning_rate,
        "warmup_ratio": 0.1,
        "seed": seed,
        "device": "cpu",
        "save_steps": 100_000,
    }
    module: Any = Distiller
    if live:
        manifest = open_cache(options.train).manifest
        teacher = load_teacher(
            TeacherConfig(model=options.teacher, dtype=manifest.teacher.dtype, device="cpu"),
            manifest.tokenizer.vocab_size,
        )
        module = partial(LiveDistiller, teacher=teacher)
    result = train_student(build(TrainConfig, settings), resume=True, progress=False, module=module)
    judged = evaluate(options.held_out, [str(output)], device="cpu", progress=False).students[0]
    print(f"{name}, seed {seed}: loss {judged.loss:.4f}, KL {judged.kl:.4f}", flush=True)
    found = {"loss": judged.loss, "kl": judged.kl, "ece": judged.ece, "agreement": judged.agreement}
    found["tokens_per_s"] = result.tokens_per_s
    judged_file.write_text(json.dumps(found))
    return found


def row(options: Any, name: str, results: dict[tuple[str, int], dict[str, float]]) -> dict[str, Any]:
    found = [results[name, seed] for seed in options.seeds]
    manifest = open_cache(cache_path(options, VARIANTS[name][0])).manifest
    none = VARIANTS[name][2] or "only" in name
    cells: dict[str, Any] = {"targets": name, "bytes/token": "-" if none else f"{manifest.bytes_per_token:.1f}"}
    for key in ("loss", "kl", "ece"):
        cells[key] = interval([item[key] for item in found])
    if LIVE in options.variants:
        for key, heading in (("loss", "loss above live"), ("kl", "KL above live")):
            paired = [results[name, seed][key] - results[LIVE, seed][key] for seed in options.seeds]
            cells[heading] = "-" if name == LIVE else interval(paired)
    cells["tokens/s"] = statistics.mean(item["tokens_per_s"] for item in found)
    return cells


def interval(values: list[float]) -> str:
    """Return mean and half width of the 95% interval of Student's t distribution."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    t = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}.get(len(values) - 1, 2.6)
    return f"{mean:.4f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def finish(options: Any, rows: list[dict[str, Any]], runs: dict[str, Any]) -> None:
    teacher = evaluate(options.held_out, [], progress=False).teacher
    title = f"Held-out loss of the teacher: {teacher.loss:.4f}; students after {_epochs(options)}"
    report.show(title, rows, {"runs": runs, "teacher": json.loads(teacher.model_dump_json())}, options.json)
    if options.docs:
        path = Path(options.docs) / "students.md"
        path.write_text(page(options, rows, teacher.loss))
        print(f"written to {path}")


def page(options: Any, rows: list[dict[str, Any]], teacher_loss: float) -> str:
    train, held_out = (open_cache(path).manifest for path in (options.train, options.held_out))
    manifest = json.loads((Path(options.work) / "students" / first_student(options) / "config.json").read_text())
    columns = list(rows[0])
    cells = [[f"{v:,.0f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in (columns, [":--", *["--:"] * (len(columns) - 1)], *cells)]
    machine = ", ".join(f"{key} {value}" for key, value in report.machine().items() if value is not None)
    return _PAGE.format(
        teacher=f"{Path(train.teacher.name).name}, {train.teacher.dtype}; held-out loss {teacher_loss:.4f}",
        train=f"{', '.join(train.corpus.sources)}, {train.num_positions:,} positions, {_epochs(options)}",
        held_out=f"{', '.join(held_out.corpus.sources)}, {held_out.num_positions:,} positions",
        student=f"{_origin(options)}: {manifest['architectures'][0]}, width {manifest['hidden_size']}, "
        f"{manifest['num_hidden_layers']} layers",
        steps=f"{options.batch_sequences} sequences a step, AdamW, peak learning rate {options.learning_rate:g}",
        seeds=", ".join(map(str, options.seeds)),
        machine=machine,
        table="\n".join(lines),
    )


def _epochs(options: Any) -> str:
    return f"{options.epochs:g} {'epoch' if options.epochs == 1 else 'epochs'}"


def _origin(options: Any) -> str:
    if not options.student:
        return f"{options.student_size}, fresh"
    before = evaluate(options.held_out, [options.student], device="cpu", progress=False).students[0]
    return f"trained before, held-out loss {before.loss:.4f} and KL {before.kl:.4f}"


def first_student(options: Any) -> str:
    return sorted(path.name for path in (Path(options.work) / "students").iterdir())[0]


if __name__ == "__main__":
    main()
