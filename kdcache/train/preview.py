"""Report a training run before its first step: how good student and teacher are, what it costs, what looks wrong.

`preview_training` reports a run that is not made (a dry run): it loads the student, times it and discards it.
`report_start` reports a run that is about to begin and leaves no trace: weights, gradients, the state of the random
numbers and the order of the data stay as they are, so the run ends with the same weights, bit for bit. It measures no
times, because the progress bar of the run shows them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.cache.batches import MicroBatches
from kdcache.losses import Loss, Objective, Part
from kdcache.losses.schedules import highest
from kdcache.losses.temperature import TemperedLoss
from kdcache.models.loading import pick_device
from kdcache.step import StepInputs
from kdcache.tasks import Task, task_of
from kdcache.torch_data import to_tensors
from kdcache.train.config import TrainConfig
from kdcache.train.memory import estimate_memory
from kdcache.train.module import Distiller
from kdcache.train.prepare import PreparedRun, prepare, started_processes
from kdcache.train.report import TermReport, TrainingReport
from kdcache.train.sample import SAMPLE_POSITIONS, Batch, Measured, first_batches, measure
from kdcache.train.timing import SpeedReport, loss_s, optimiser_s, position_s

#: Positions of one batch of the sample, by device type: enough to fill the device, in a short forward pass.
_BATCH_POSITIONS = {"cpu": 1024}
_BATCH_POSITIONS_ELSEWHERE = 16_384
#: Most micro-batches that are timed, and positions that the loss is timed on.
_TIMED_BATCHES = 4
_LOSS_POSITIONS = {"cpu": 256}
_LOSS_POSITIONS_ELSEWHERE = 4096


@dataclass(frozen=True)
class _Look:
    """A prepared run, its module (on the device of the run) and its micro-batches."""

    run: PreparedRun
    module: Distiller
    batches: MicroBatches

    @property
    def objective(self) -> Objective:
        return self.module.objective

    @property
    def device(self) -> torch.device:
        return next(iter(self.module.parameters())).device

    @property
    def task(self) -> Task:
        return task_of(self.run.cache.manifest.task)

    @property
    def autocast(self) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        return partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.run.config.precision == "bf16")

    def longest(self, count: int) -> Batch:
        """Return a batch of ``count`` copies of the longest sequence that is trained on."""
        sizes_N, chosen_N = self.run.cache.sizes_N, self.run.chosen_N
        index = int(np.argmax(sizes_N) if chosen_N is None else chosen_N[np.argmax(sizes_N[chosen_N])])
        return self._read([index] * count)

    def read(self, num_positions: int) -> Iterator[Batch]:
        """Yield the first batches of the training order, on the device."""
        size = _BATCH_POSITIONS.get(self.device.type, _BATCH_POSITIONS_ELSEWHERE)
        chosen = first_batches(self.run.cache, self.batches, num_positions=num_positions, batch_positions=size)
        yield from map(self._read, chosen)

    def _read(self, indices: list[int]) -> Batch:
        read = self.run.cache.read(indices, fields=self.module.hidden_fields)
        tensors = to_tensors(read, self.run.student.pad_id, self.task)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}


def preview_training(config: TrainConfig) -> TrainingReport:
    """Return what `train_student` would do, what it would cost, and warnings; writes nothing.

    Loads the student and times a few micro-batches. Raises what `train_student` raises before its first step, except
    for problems with the output.
    """
    run = prepare(config)
    run.warn_of_rereading()
    run.warn_of_rounding()
    module = Distiller(run.student, run.objective).to(pick_device(config.device))
    return _report(_Look(run, module, run.micro_batches(num_ranks=started_processes())), is_timed=True)


def report_start(run: PreparedRun, module: Distiller, batches: MicroBatches) -> TrainingReport:
    """Return the report of a run that is about to begin with ``batches``; the run is not changed by it."""
    look = _Look(run, module, batches)
    devices = [look.device] if look.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return _report(look, is_timed=False)


def _report(look: _Look, is_timed: bool) -> TrainingReport:
    run, batches, objective = look.run, look.batches, look.objective
    config, manifest = run.config, run.cache.manifest
    sample = list(look.read(SAMPLE_POSITIONS))
    measured = measure(look.module, sample, look.autocast)
    with torch.no_grad(), look.autocast():
        inputs = look.module.inputs(sample[0]).leaves()
    steps = run.num_steps(batches)
    positions = int(run.lengths_N.sum())
    tokens_per_step = round(positions * min(batches.sequences_per_step / batches.num_sequences, 1.0))
    teacher_loss, kept_mass = _statistics(run.cache, run.chosen_N)
    memory = estimate_memory(
        look.module,
        inputs,
        run.cache,
        batch_sequences=batches.largest,
        max_length=int(run.lengths_N.max()),
        autocast=look.autocast,
        longest=None if look.task.is_causal else look.longest,
    )
    speed, costs_s = _timed(look, inputs, steps, tokens_per_step) if is_timed else (None, {})
    return TrainingReport(
        student=type(run.student.model).__name__,
        num_parameters=run.student.num_parameters,
        num_trainable_parameters=sum(p.numel() for p in look.module.parameters() if p.requires_grad),
        teacher=manifest.teacher.name,
        num_sequences=batches.num_sequences,
        num_positions=positions,
        sequences_per_step=batches.sequences_per_step,
        tokens_per_step=tokens_per_step,
        unit=look.task.unit,
        steps_per_epoch=batches.steps_per_epoch,
        steps=steps,
        epochs=round(steps / batches.steps_per_epoch, 3),
        learning_rate=config.peak_learning_rate,
        objective={name: part.model_dump() for name, part in objective.config.parts.items()},
        output=config.output,
        vocab_size=manifest.num_ids,
        teacher_loss=teacher_loss,
        kept_mass=kept_mass,
        sample=measured.report,
        terms=tuple(
            _term(objective, name, part, kept_mass, measured, costs_s.get(name))
            for name, part in objective.config.parts.items()
        ),
        memory=memory,
        speed=speed,
    )


def _statistics(cache: Cache, chosen_N: NDArray[np.int64] | None) -> tuple[float | None, float | None]:
    """Return the teacher's loss and the kept mass, means over the valid positions of ``chosen_N`` (None: all).

    None for what is unknown: the loss where the corpus has no labels or the cache no log-probability of them, both
    where there are no distributions.
    """
    targets = cache.manifest.targets
    if targets.kind == "outputs":
        return None, None
    has_loss = "gold_logprob" in targets.scalars
    if chosen_N is None:
        sums = cache.manifest.statistics
        num_labelled = sums.num_positions - sums.num_unlabelled
        is_known = has_loss and (num_labelled or not sums.num_positions)
        loss = sums.teacher_loss_sum / num_labelled if is_known else None
        return loss, sums.kept_mass_sum / max(sums.num_positions, 1)
    table = cache.sequence_table(["num_targets", "kept_mass", *(["teacher_loss"] if has_loss else [])])
    counts, masses, *losses = (table[name].to_numpy()[chosen_N].astype(float) for name in table.column_names)
    return _weighted_mean(losses[0], counts) if losses else None, _weighted_mean(masses, counts)


def _weighted_mean(values_N: NDArray[np.float64], counts_N: NDArray[np.float64]) -> float | None:
    # A sequence without valid positions has no value, and one without labels has no loss.
    is_known_N = (counts_N > 0) & ~np.isnan(values_N)
    if counts_N.sum() and not is_known_N.any():
        return None
    return float((counts_N * values_N)[is_known_N].sum() / max(counts_N[is_known_N].sum(), 1.0))


def _term(
    objective: Objective,
    name: str,
    part: Part,
    kept_mass: float | None,
    measured: Measured,
    cost_s: float | None,
) -> TermReport:
    first, last = part.at(0.0), part.at(1.0)
    mode = _mode(first, objective)
    # Whole distributions and samples have no tail to handle.
    has_tail = mode != "full" and not objective.context.is_sampled
    masses = [_kept_mass(part.at(progress), objective, kept_mass, measured) for progress in part.sample_points()]
    known = [mass for mass in masses if mass is not None]
    return TermReport(
        name=name,
        weight=first.weight,
        weight_end=last.weight,
        temperature=getattr(first, "temperature", None),
        temperature_end=getattr(last, "temperature", None),
        mode=mode,
        tail=getattr(first, "tail", None) if has_tail else None,
        needs="the teacher's last hidden state and LM head" if mode == "full" else part.sources,
        uses_teacher=part.uses_teacher,
        is_trained=highest(part.weight) > 0,
        kept_mass=min(known) if known else None,
        selected=None if part.select is None else measured.mean(measured.selected_sums[name]),
        value=measured.mean(measured.term_sums[name]),
        ms_per_1000_positions=None if cost_s is None else 1e6 * cost_s,
    )


def _mode(part: Part, objective: Objective) -> str | None:
    """Return how a loss applies its temperature; None where it has no such setting or needs none."""
    if not isinstance(part, TemperedLoss):
        return None
    mode = part.resolved_mode(objective.context)
    return mode if mode == "full" or part.temperature != 1.0 else None


def _kept_mass(part: Part, objective: Objective, at_one: float | None, measured: Measured) -> float | None:
    """Return the teacher's mass on the ids that the term compares one by one; None where that has no meaning.

    Modes: ``full`` compares all ids, ``grid`` the kept ones at its temperature, whose tail was stored; ``decoupled``
    compares kept ids with the tail at temperature 1 and only softens what is among the kept ids.
    """
    context = objective.context
    if not isinstance(part, Loss) or not part.uses_teacher or context.is_sampled:
        return None
    # Where there is a head, losses without a mode make the teacher's logits too.
    if context.head is not None and (not isinstance(part, TemperedLoss) or part.resolved_mode(context) == "full"):
        return 1.0
    temperature = getattr(part, "temperature", 1.0)
    if temperature == 1.0 or _mode(part, objective) != "grid":
        return at_one
    column = context.grid_index(temperature)
    assert column is not None
    return 1 - measured.mean(measured.tail_sums_G[column])


def _timed(look: _Look, inputs: StepInputs, steps: int, tokens_per_step: int) -> tuple[SpeedReport, dict[str, float]]:
    """Return the times of the run and the seconds per position that each term adds; changes the student's weights."""
    look.objective.progress = 0.5  # every loss that a schedule switches on is on
    size = _LOSS_POSITIONS.get(look.device.type, _LOSS_POSITIONS_ELSEWHERE)
    whole_s, costs_s = loss_s(look.module, inputs.leaves(size), look.autocast)
    per_position_s, tokens_per_position = position_s(
        look.module, look.read(_TIMED_BATCHES * SAMPLE_POSITIONS), look.autocast
    )
    step_s = per_position_s * tokens_per_step / look.batches.num_ranks + optimiser_s(look.module.parameters())
    return SpeedReport(
        tokens_per_s=tokens_per_position / per_position_s,
        step_s=step_s,
        eta_s=steps * step_s,
        loss_share=min(whole_s / per_position_s, 1.0),
    ), costs_s
