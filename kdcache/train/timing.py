"""Time a step on a few micro-batches.

Every number is approximate: it comes from a few seconds on a machine that may be busy. The cost of a term is the time
of the whole loss minus the time without the term. Terms share the head product and the passes over the logits, so two
terms cost less than the sum of each alone; the last trained term is charged with what is shared.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from kdcache.config import Config
from kdcache.losses import Objective
from kdcache.step import StepInputs
from kdcache.torch_data import count_tokens
from kdcache.train.module import Distiller
from kdcache.train.sample import Batch

#: Seconds after which no further measurement of a kind begins.
_BUDGET_S = 1.0
_ROUNDS = 3


class SpeedReport(Config):
    """Approximate times of an optimiser step and of the whole run, in seconds.

    ``tokens_per_s`` counts the tokens that the student reads in one process, without padding, as the run itself does;
    ``loss_share`` is the share of a micro-batch's time that loss and LM head take.
    """

    tokens_per_s: float
    step_s: float
    eta_s: float
    loss_share: float


def position_s(module: Distiller, batches: Iterable[Batch], autocast: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds per position of reading ``batches``, forward and backward, and the tokens read per position.

    Leaves gradients.
    """
    device = next(module.parameters()).device
    num_positions = num_tokens = 0
    began_s = _now_s(device)
    module.train()
    for batch in batches:
        with autocast():
            loss = module(batch, batch["loss_mask"].sum())[0]
        loss.backward()
        num_positions += batch["labels"].numel()
        num_tokens += int(count_tokens(batch))
        if _now_s(device) - began_s > _BUDGET_S:
            break
    elapsed_s, count = _now_s(device) - began_s, max(num_positions, 1)
    return elapsed_s / count, num_tokens / count


def optimiser_s(parameters: Iterable[nn.Parameter]) -> float:
    """Return the seconds of an AdamW step, scaled up from the largest parameter; changes that parameter."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    largest = max(trained, key=lambda parameter: parameter.numel())
    largest.grad = torch.zeros_like(largest)
    optimiser = torch.optim.AdamW([largest], fused=largest.device.type in ("cpu", "cuda"))
    optimiser.step()  # makes the moments
    elapsed_s = _best_s({"step": optimiser.step}, largest.device)["step"]
    return elapsed_s * sum(parameter.numel() for parameter in trained) / largest.numel()


def loss_s(module: Distiller, inputs: StepInputs, autocast: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Return the seconds per position of the whole loss, and those that each term adds; leaves gradients.

    ``inputs`` are leaves (`StepInputs.leaves`).
    """
    calls = {
        name: partial(inputs.backward, variant, module.student, autocast)
        for name, variant in _variants(module.objective).items()
    }
    times_s = _best_s(calls, inputs.hidden_PD.device)
    whole_s, count = times_s.pop(""), max(inputs.num_positions, 1)
    return whole_s / count, {name: max(whole_s - time_s, 0.0) / count for name, time_s in times_s.items()}


def _variants(objective: Objective) -> dict[str, Objective]:
    """Return the objective under the empty name, and under each term's name the objective without that term."""
    return {"": objective} | {name: _without(objective, name) for name in objective.config.parts}


def _without(objective: Objective, name: str) -> Objective:
    # Without the last trained term nothing is computed for the LM head, so that term is charged with what all share.
    variant = copy.copy(objective)
    variant.config = objective.config.model_copy(update={name: None})
    variant.terms = nn.ModuleDict({other: term for other, term in objective.terms.items() if other != name})
    return variant


def _best_s(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Return the shortest time of each call; they take turns, so that a busy moment affects them all."""
    times_s: dict[str, float] = {}
    began_s = _now_s(device)
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start_s = _now_s(device)
            call()
            elapsed_s = _now_s(device) - start_s
            times_s[name] = min(elapsed_s, times_s.get(name, elapsed_s))
        if _now_s(device) - began_s > _BUDGET_S:
            break
    return times_s


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
