"""Measure a training step from a cache against plain fine-tuning and other ways to distil.

A step is forward, backward and AdamW on the same batch, for students of several sizes. Every round times all ways once,
in turns; the result is the ratio to the plain cross-entropy step of Hugging Face in the same round. Memory is the peak
of a separate process, less the state of the model and the optimiser (weights, gradients, two moments) and less what the
process needed before.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import report
from benchmarks.synthetic import make_targets
from benchmarks.teacher import gguf_path
from kdcache.losses import Objective, ObjectiveConfig, TeacherRows
from kdcache.models.bodies import split_for
from kdcache.students.load import Student
from kdcache.teachers import TeacherConfig, load_teacher

#: Shapes of students by their millions of parameters at 49,152 ids; the last is SmolLM2-135M's.
SIZES: dict[str, dict[str, int]] = {
    "11M": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 512},
    "30M": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024},
    "135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
}
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PLAIN = "plain"


_PAGE = """# What a step costs

Written by `python -m benchmarks.step --docs docs`; do not edit it by hand.

| | |
|---|---|
| step | {step} |
| machine | {machine} |

{table}

- A *step* is forward, backward and AdamW on one batch of random texts; reading and decoding the cache are not in it
  (`python -m benchmarks.reader`: a few milliseconds for such a batch).
- *time / plain*: median, smallest and largest ratio to Hugging Face's own cross-entropy step of the same student in
  the same round; all ways take turns within a round.
- *peak*: the most memory of a process above weights, gradients and the two moments of AdamW, each way in a process of
  its own. Dense KD holds the teacher's distribution of the batch, online KD runs the teacher (135M, bfloat16).
- *naive sparse KD* is the bucket loss as it is usually written: log-softmax over all logits, then a gather.
"""


@dataclass
class Setting:
    """A student, its optimiser and a batch, from which every way makes its step."""

    student: Student
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]
    rows: TeacherRows
    device: torch.device
    precision: str
    teacher: Any = None
    teacher_probs_PV: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: self.batch[name] for name in ("input_ids", "attention_mask")}

    def step(self, loss_of: Callable[[Setting], Tensor]) -> float:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = loss_of(self)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def plain(setting: Setting) -> Tensor:
    # The model shifts the labels by itself, so these are the inputs; it makes logits of every position all the same.
    loss: Tensor = setting.student.model(**setting.inputs, labels=setting.batch["input_ids"], use_cache=False).loss
    return loss


def distil(config: ObjectiveConfig) -> Callable[[Setting], Tensor]:
    objective = Objective(config)

    def loss_of(setting: Setting) -> Tensor:
        hidden_PD = setting.student.hidden(setting.batch)
        return objective(hidden_PD, setting.student.head, setting.rows, len(hidden_PD)).loss

    return loss_of


def checkpointed(loss_of: Callable[[Setting], Tensor]) -> Callable[[Setting], Tensor]:
    """Make the loss without keeping the body's activations, which the backward then computes again."""

    def loss_of_it(setting: Setting) -> Tensor:
        model = setting.student.model
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            return loss_of(setting)
        finally:  # it is the forward that looks at the setting
            model.gradient_checkpointing_disable()

    return loss_of_it


def full_logits(setting: Setting) -> Tensor:
    logits: Tensor = setting.student.model(**setting.inputs, use_cache=False).logits
    return logits.float().flatten(0, 1)[setting.batch["rows"]]


def naive(setting: Setting) -> Tensor:
    """Sparse KD as it is usually written: log-softmax over everything, then a gather."""
    logits_PV, rows = full_logits(setting), setting.rows
    logprobs_PV = logits_PV.log_softmax(-1)
    student_PK = logprobs_PV.gather(1, rows.ids_PK)
    probs_PK = rows.logprobs_PK.exp()
    tail_P = torch.log1p(-student_PK.exp().sum(1).clamp(max=1 - 1e-6))
    kl = (probs_PK * (rows.logprobs_PK - student_PK)).sum(1) + rows.log_tail_P.exp() * (rows.log_tail_P - tail_P)
    return 0.9 * kl.mean() + 0.1 * functional.cross_entropy(logits_PV, rows.labels_P)


def dense(setting: Setting) -> Tensor:
    """KD on the teacher's whole distribution, as if it came from memory at no cost."""
    assert setting.teacher_probs_PV is not None
    return _dense(full_logits(setting), setting.teacher_probs_PV, setting.rows.labels_P)


def online(setting: Setting) -> Tensor:
    """KD with the teacher's forward in every step."""
    with torch.no_grad():
        teacher_BLV = setting.teacher.model(**setting.inputs, use_cache=False).logits
        known_BLV = teacher_BLV[..., : setting.student.vocab_size]  # a teacher's head may have padding rows
        probs_PV = known_BLV.float().flatten(0, 1)[setting.batch["rows"]].softmax(-1)
    return _dense(full_logits(setting), probs_PV, setting.rows.labels_P)


def _dense(logits_PV: Tensor, probs_PV: Tensor, labels_P: Tensor) -> Tensor:
    kl = functional.kl_div(logits_PV.log_softmax(-1), probs_PV, reduction="batchmean")
    return 0.9 * kl + 0.1 * functional.cross_entropy(logits_PV, labels_P)


def _objective(**terms: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(terms)


_CE_AND_KD = distil(_objective(forward_kl={"weight": 0.9}, cross_entropy={"weight": 0.1}))

#: Name -> (heading, what makes the loss).
WAYS: dict[str, tuple[str, Callable[[Setting], Tensor]]] = {
    PLAIN: ("plain cross-entropy (HF)", plain),
    "kdcache": ("kdcache, CE + KD", _CE_AND_KD),
    "kdcache-checkpointing": ("the same with gradient checkpointing", checkpointed(_CE_AND_KD)),
    "kdcache-ce": ("kdcache, CE alone", distil(_objective(cross_entropy={"weight": 1.0}))),
    "kdcache-t2": (
        "kdcache, CE + KD at T = 2",
        distil(_objective(forward_kl={"weight": 0.9, "temperature": 2.0}, cross_entropy={"weight": 0.1})),
    ),
    "naive": ("naive sparse KD", naive),
    "dense": ("dense KD", dense),
    "online": ("online KD", online),
}


def main() -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES, "tiny"], default=list(SIZES))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--teacher", default=gguf_path(), help="of online KD; hub id, directory or GGUF file")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--docs", metavar="DIR", help="write step.md there")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(peak_bytes(options)))
        return
    rows, runs = [], {}
    for size in options.sizes:
        found = measure(options, size)
        runs[size] = found
        rows += [_row(size, name, found) for name in found]
    report.show(f"A step of {options.sequences} x {options.length} positions", rows, {"runs": runs}, options.json)
    if options.docs:
        path = Path(options.docs) / "step.md"
        path.write_text(page(options, rows))
        print(f"written to {path}")


def page(options: Any, rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    cells = [[f"{v:,.0f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    rule = [":--", ":--", *["--:"] * (len(columns) - 2)]
    machine = ", ".join(f"{key} {value}" for key, value in report.machine().items() if value is not None)
    return _PAGE.format(
        step=f"{options.sequences} x {options.length} positions, {options.vocab_size:,} ids, K = {options.top_k}, "
        f"{options.precision}, {options.rounds} rounds",
        machine=machine,
        table="\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *cells)),
    )


def measure(options: Any, size: str) -> dict[str, dict[str, Any]]:
    """Return for every way its seconds in each round and its peak memory."""
    setting = make_setting(options, size, options.ways)
    seconds: dict[str, list[float]] = {name: [] for name in options.ways}
    for number in range(options.rounds + 1):
        for name in options.ways:
            took = _timed(setting, name)
            if number:  # the first is for warming up
                seconds[name].append(took)
    del setting
    gc.collect()
    memory = {} if options.no_memory else {name: _memory(options, size, name) for name in options.ways}
    num_positions = options.sequences * options.length
    return {
        name: {"seconds": seconds[name], "num_positions": num_positions, **memory.get(name, {})}
        for name in options.ways
    }


def _timed(setting: Setting, name: str) -> float:
    gc.collect()
    _synchronise(setting.device)
    started_s = time.perf_counter()
    setting.step(WAYS[name][1])
    _synchronise(setting.device)
    return time.perf_counter() - started_s


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _row(size: str, name: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    seconds, peak = found[name]["seconds"], found[name].get("peak_bytes")
    middle = statistics.median(seconds)
    cells: dict[str, Any] = {"student": size, "step": WAYS[name][0], "ms": f"{1000 * middle:,.0f}"}
    cells["tokens/s"] = found[name]["num_positions"] / middle
    if PLAIN in found:
        ratios = sorted(a / b for a, b in zip(seconds, found[PLAIN]["seconds"], strict=True))
        cells["time / plain"] = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    if peak is not None:
        cells["peak MiB"] = f"{peak / 2**20:,.0f}"
        if PLAIN in found:
            cells["peak / plain"] = f"{peak / found[PLAIN]['peak_bytes']:.2f}"
    return cells


def _memory(options: Any, size: str, name: str) -> dict[str, int]:
    """Return the peak of one way, measured in a process of its own."""
    given = ["sequences", "length", "top_k", "vocab_size", "precision", "device", "threads", "teacher"]
    values = [(f"--{key.replace('_', '-')}", getattr(options, key)) for key in given]
    arguments = [text for key, value in values if value is not None for text in (key, str(value))]
    command = [sys.executable, "-m", "benchmarks.step", "--sizes", size, "--memory-of", name, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_bytes(options: Any) -> dict[str, int]:
    """Return the most memory that two steps took above the state of model and optimiser."""
    setting = make_setting(options, options.sizes[0], [options.memory_of])
    num_parameters = sum(parameter.numel() for parameter in setting.student.model.parameters())
    own = 3 * num_parameters * 4  # gradients and two moments; the weights are there already
    if setting.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        highest: Callable[[], int] = torch.cuda.max_memory_allocated
    else:
        gc.collect()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        highest = lambda: _status("VmHWM")  # noqa: E731
    for _ in range(2):
        setting.step(WAYS[options.memory_of][1])
    return {"peak_bytes": highest() - before - own, "num_parameters": num_parameters}


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def make_setting(options: Any, size: str, ways: list[str]) -> Setting:
    torch.manual_seed(0)
    device = torch.device(options.device)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
        **(TINY if size == "tiny" else SIZES[size]),
    )
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    parts = split_for("tokens", model, None)
    assert parts is not None
    student = Student(model, None, parts, options.vocab_size)
    batch, rows = make_batch(options)
    setting = Setting(
        student,
        torch.optim.AdamW(model.parameters(), lr=1e-4),
        {name: value.to(device) for name, value in batch.items()},
        rows.to(device),
        device,
        options.precision,
    )
    if "dense" in ways:
        probs_PV = torch.zeros(len(rows.ids_PK), options.vocab_size)
        setting.teacher_probs_PV = probs_PV.scatter_(1, rows.ids_PK, rows.logprobs_PK.exp()).to(device)
    if "online" in ways:
        config = TeacherConfig(model=options.teacher, dtype="bfloat16", device=options.device)
        setting.teacher = load_teacher(config, options.vocab_size)
    return setting


def make_batch(options: Any) -> tuple[dict[str, Tensor], TeacherRows]:
    generator = np.random.default_rng(0)
    num_positions = options.sequences * options.length
    targets = make_targets(generator, num_positions, options.top_k, options.vocab_size)
    tokens = torch.from_numpy(generator.zipf(1.2, num_positions + 1) % options.vocab_size)
    input_ids = tokens[:-1].view(options.sequences, options.length)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "rows": torch.arange(num_positions),
    }
    rows = TeacherRows(
        ids_PK=torch.from_numpy(targets.ids_PK).long(),
        logprobs_PK=torch.from_numpy(targets.logprobs_PK),
        log_tail_P=torch.from_numpy(targets.log_tail_P),
        entropy_P=torch.from_numpy(targets.entropy_P),
        labels_P=tokens[1:],
        loss_mask_P=torch.ones(num_positions, dtype=torch.bool),
    )
    return batch, rows


if __name__ == "__main__":
    main()
