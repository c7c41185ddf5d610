"""Training runs for the tests: a tiny configuration, the gradients of every step, and what they should be.

As a script (``python -m tests.train_runs runs.json recorded.pt``) it is one rank of distributed runs.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from kdcache.config import build
from kdcache.train import Distiller, TrainConfig, TrainResult, leave_processes, train_student

ROOT = Path(__file__).parent.parent


class Recorder(TrainerCallback):
    """Keep what every optimiser step was about to do: gradients (before clipping) and weights, of all parameters.

    With ``trained_only`` those of the ones that are trained.
    """

    def __init__(self, *, trained_only: bool = False) -> None:
        self.trained_only = trained_only
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = {
            name.removeprefix(
                "model.",
            ): p
            for name, p in model.named_parameters()
            if p.requires_grad or not self.trained_only
        }
        self.gradients.append({name: parameter.grad.clone() for name, parameter in named.items()})
        self.weights.append({name: parameter.detach().clone() for name, parameter in named.items()})


def settings(cache: Path, output: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "cache": str(cache),
        "output": str(output),
        "student": {"size": "nano", "seed": 1},
        "max_steps": 4,
        "batch_sequences": 8,
        "warmup_ratio": 0.0,
        "schedule": "linear",
        "max_grad_norm": 0.0,
        "device": "cpu",
        "logging_steps": 1,
        "save_steps": 100,
    }
    return {**base, **changes}


def train(
    values: dict[str, Any],
    *,
    callbacks: Any = (),
    resume: bool = False,
    module: Callable[..., Distiller] = Distiller,
) -> TrainResult:
    config = build(TrainConfig, values)
    return train_student(config, progress=False, callbacks=callbacks, resume=resume, module=module)


def live_loss(
    student: Any, teacher: Any, sequences: Sequence[np.ndarray], masks: Sequence[np.ndarray], top_k: int, weight: float
) -> Tensor:
    """Distillation with a live teacher, one sequence at a time, from whole logits: nothing of kdcache is used.

    ``weight`` is that of the bucket KL; the cross-entropy has the rest.
    """
    total, count = torch.zeros(()), 0
    for tokens, mask in zip(sequences, masks, strict=True):
        ids = torch.from_numpy(tokens.astype(np.int64))
        valid = torch.from_numpy(mask.astype(bool))
        with torch.no_grad():
            log_t = teacher(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        log_p = student(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        ce = -log_p.gather(1, ids[1:, None])[:, 0]
        if top_k < log_t.shape[1]:
            order = log_t.argsort(descending=True, stable=True)
            log_t, log_p = (_coarsen(x.gather(1, order), top_k) for x in (log_t, log_p))
        kl = (log_t.exp() * (log_t - log_p)).sum(-1)
        total = total + (weight * kl + (1 - weight) * ce)[valid].sum()
        count += int(valid.sum())
    return total / count


def _coarsen(logprobs: Tensor, top_k: int) -> Tensor:
    return torch.cat([logprobs[:, :top_k], logprobs[:, top_k:].logsumexp(-1, keepdim=True)], -1)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    a, b = flat(found), flat(expected)
    return float((a - b).norm() / b.norm())


class NotMultiplied(Distiller):
    """Undo the trainer's multiplication by the number of processes, as one who does not know of the trap would."""

    def forward(self, batch: Any, num_valid: Any) -> Any:
        loss, *rest = super().forward(batch, num_valid)
        return loss / torch.distributed.get_world_size(), *rest


def train_distributed(
    runs: dict[str, dict[str, Any]],
    folder: Path,
    python: str,
    *,
    not_multiplied: Sequence[str] = (),
    num_ranks: int = 2,
) -> dict[str, dict[str, Any]]:
    """Train each of ``runs`` (settings by name) on several processes; return what `Recorder` recorded of each.

    ``python`` is an interpreter, such as that of the fixture ``preloaded``.
    """
    (folder / "runs.json").write_text(json.dumps([runs, list(not_multiplied)]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "tests.train_runs", str(folder / "runs.json"), str(folder / "recorded.pt")]
    world = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **world, **cpu, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(folder / "recorded.pt")  # type: ignore[no-any-return]


def _main(runs_file: str, recorded_file: str) -> None:
    import tests.families  # noqa: F401  (registers a model of the tests' own)

    torch.set_num_threads(1)
    gc.freeze()
    recorded = {}
    runs, not_multiplied = json.loads(Path(runs_file).read_text())
    for name, values in runs.items():
        recorder = Recorder(trained_only=True)
        module = NotMultiplied if name in not_multiplied else Distiller
        train(values, callbacks=[recorder], module=module, resume=True)  # of what another world began, if anything
        recorded[name] = {"gradients": recorder.gradients, "weights": recorder.weights}
    if torch.distributed.get_rank() == 0:
        torch.save(recorded, recorded_file)
    leave_processes()


if __name__ == "__main__":
    _main(*sys.argv[1:])
