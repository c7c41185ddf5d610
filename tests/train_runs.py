"""Training runs for the tests: a tiny configuration, and the gradients of every step.

As a script (``python -m tests.train_runs config.json gradients.pt``) it is one rank of a distributed run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from kdcache.config import build
from kdcache.train import TrainConfig, TrainResult, train_student


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


def train(values: dict[str, Any], *, callbacks: Any = (), resume: bool = False) -> TrainResult:
    config = build(TrainConfig, values)
    return train_student(config, progress=False, callbacks=callbacks, resume=resume)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    a, b = flat(found), flat(expected)
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorder = Recorder()
    train(json.loads(Path(sys.argv[1]).read_text()), callbacks=[recorder])
    if torch.distributed.get_rank() == 0:
        torch.save(recorder.gradients, sys.argv[2])
    torch.distributed.destroy_process_group()
