"""What a step costs, measured on a few micro-batches that are then forgotten.

Every number is approximate: a few seconds on a machine that may do other things as well. A term's cost is the time
of the whole loss with it minus the time without it, because terms share the head product and the passes over the
logits: two terms are not as dear as each alone. The last trained term is charged with what is shared.
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
from kdcache.train.module import Distiller
from kdcache.train.sample import Batch

#: Seconds after which no further measurement of a kind begins.
_BUDGET_S = 1.0
_ROUNDS = 3


class SpeedReport(Config):
    """Approximate times: of the ``loss`` per 1,000 positions, of an optimiser step, and of the whole run.

    ``tokens_per_s`` counts predicted positions of one process; ``loss_share`` is the part of a micro-batch's time that
    loss and LM head take.
    """

    tokens_per_s: float
    step_s: float
    eta_s: float
    loss_share: float


def position_s(module: Distiller, batches: Iterable[Batch], autocast: Callable[[], Any]) -> float:
    """Return the seconds that reading ``batches``, forward and backward take per position; leaves gradients."""
    device = next(module.parameters()).device
    num_positions, began_s = 0, _now_s(device)
    module.train()
    for batch in batches:
        with autocast():
            loss = module(batch, batch["loss_mask"].sum())[0]
        loss.backward()
        num_positions += batch["labels"].numel()
        if _now_s(device) - began_s > _BUDGET_S:
            break
    return (_now_s(device) - began_s) / max(num_positions, 1)


def optimiser_s(parameters: Iterable[nn.Parameter]) -> float:
    """Return the seconds of an AdamW step: of the largest parameter, times all of them. Changes that parameter."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    largest = max(trained, key=lambda parameter: parameter.numel())
    largest.grad = torch.zeros_like(largest)
    optimiser = torch.optim.AdamW([largest], fused=largest.device.type in ("cpu", "cuda"))
    optimiser.step()  # makes the moments
    elapsed_s = _best_s({"step": optimiser.step}, largest.device)["step"]
    return elapsed_s * sum(parameter.numel() for parameter in trained) / largest.numel()


def loss_s(module: Distiller, inputs: StepInputs, autocast: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Return the seconds per position of the whole loss, and how many of them each term adds; leaves gradients.

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
    """Return the objective under the empty name, and under the name of each of its terms the one without it."""
    return {"": objective} | {name: _without(objective, name) for name in objective.config.parts}


def _without(objective: Objective, name: str) -> Objective:
    # Where no other term trains, nothing is left to do for the LM head: the last term bears what all of them share.
    variant = copy.copy(objective)
    variant.config = objective.config.model_copy(update={name: None})
    variant.terms = nn.ModuleDict({other: term for other, term in objective.terms.items() if other != name})
    return variant


def _best_s(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Return the shortest time of each call, in turns, so that a busy moment hits none of them alone."""
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
