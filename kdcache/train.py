"""Train a student from a cache; the teacher is never loaded.

The configuration says what only the user can know (which cache, which student, which objective, how long). What the
cache knows (teacher, K, codec, tokenizer, lengths) is never repeated in it. The output directory is a plain Hugging
Face model beside ``kdcache_run.json``, which says how it was made; its checkpoints are such models too, plus what
resuming needs. A run that is resumed continues at the exact next batch and gives the weights that it would have given
without the interruption.

One process trains on one device; several are started with ``torchrun`` or ``accelerate launch`` and share every step
without changing its gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from kdcache.cache import Cache, open_cache
from kdcache.config import Config
from kdcache.errors import ConfigError
from kdcache.losses import Objective, ObjectiveConfig, TeacherRows
from kdcache.students import Student, StudentConfig, load_student
from kdcache.students.batches import MicroBatches, training_loader
from kdcache.students.run_record import RunRecord, check_output, settings_that_decide
from kdcache.students.trainer import (
    STATE_FILE,
    Distillation,
    DistillationTrainer,
    ProgressBar,
    check_logger,
    last_checkpoint,
    save_student,
)
from kdcache.teaching import context_of


class TrainConfig(Config):
    """Everything about a training run that the cache does not know.

    ``batch_sequences`` is per device and micro-batch; a step trains on ``batch_sequences x gradient_accumulation x
    number of processes`` sequences. ``epochs`` (default 1) and ``max_steps`` exclude each other. ``learning_rate``
    defaults to 1e-3 for a fresh student and 3e-4 for a pretrained one. ``shuffle_window`` is how many shards are mixed
    with each other: more is better mixed and takes more memory.
    """

    cache: str
    student: StudentConfig
    output: str
    objective: ObjectiveConfig = ObjectiveConfig()
    epochs: float | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    batch_sequences: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    adam_beta2: float = Field(default=0.95, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Longer gradients are cut to this length; 0 switches that off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` computes in bfloat16 (autocast) and keeps weights and optimiser in the student's dtype."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    shuffle_window: int = Field(default=4, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=500, ge=1)
    save_total_limit: int = Field(default=2, ge=1)
    data_workers: int = Field(default=0, ge=0)
    report_to: str = "none"
    """A logger that the Trainer knows, such as ``tensorboard`` or ``wandb``."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both")
        return self

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-3 if self.student.is_fresh else 3e-4


@dataclass(frozen=True)
class TrainResult:
    """What a finished run can say: ``losses`` are means per position over the last logging window, in nats."""

    output: Path
    steps: int
    losses: dict[str, float]
    seconds: float
    tokens_per_s: float


class Distiller(Distillation):
    """A student and its objective as one module, so that distributed wrappers see a single forward."""

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__(student)
        self.objective = objective

    def forward(self, batch: Mapping[str, Tensor], num_valid: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
        hidden_PD = self.student.hidden(batch)
        result = self.objective(hidden_PD, self.student.head, TeacherRows.from_batch(batch), num_valid)
        return result.loss, result.sums, result.num_valid


def train_student(
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    module: Callable[[Student, Objective], Distillation] = Distiller,
) -> TrainResult:
    """Train a student from a cache and save it under ``config.output``.

    ``module`` joins student and objective; one of your own may get the teacher's part of a batch from elsewhere.

    With ``resume`` the newest complete checkpoint there is continued (from the beginning if there is none); a run
    that has finished gives its result again. Raises ``ConfigError`` when the output holds a run already, or another
    one than is to be resumed, or when the cache does not allow a loss; ``StudentError`` when the student does not fit
    the cache; ``CacheError`` when the cache is incomplete, damaged or missing. A loss that is not finite raises
    ``StudentError`` at the next logging step.
    """
    check_output(config.output, resume=resume)
    _check_device(config)
    check_logger(config.report_to)
    cache = _open(config)
    objective = Objective(config.objective, context=context_of(cache))
    student = load_student(config.student, cache.manifest, cache.tokenizer_dir())
    trainer, batches = _make_trainer(config, cache, module(student, objective), progress, callbacks)
    record = RunRecord.begin(
        config.output,
        settings=settings_that_decide(
            config.model_dump(mode="json"), batches.sequences_per_step, trainer.args.max_steps
        ),
        config=config.model_dump(mode="json"),
        cache=cache,
        student=student,
        resume=resume,
        write=trainer.args.should_save,
    )
    if record.finished is not None:
        return TrainResult(Path(config.output), **record.finished)
    seconds = _run(trainer, last_checkpoint(config.output) if resume else None)
    save = trainer.args.should_save
    if save:
        save_student(student, config.output)
    return _finish(config, trainer, record if save else None, seconds)


def plan_training(config: TrainConfig) -> dict[str, Any]:
    """Return what `train_student` would do: sizes, steps and tokens. Loads the student, trains nothing."""
    check_logger(config.report_to)
    cache = _open(config)
    Objective(config.objective, context=context_of(cache))  # refuses what the cache does not allow
    student = load_student(config.student, cache.manifest, cache.tokenizer_dir())
    batches = _micro_batches(config, cache)
    steps = _num_steps(config, batches)
    tokens_per_step = cache.manifest.num_positions * min(batches.sequences_per_step / len(cache), 1.0)
    return {
        "student": type(student.model).__name__,
        "num_parameters": student.num_parameters,
        "teacher": cache.manifest.teacher.name,
        "num_sequences": len(cache),
        "num_positions": cache.manifest.num_positions,
        "sequences_per_step": batches.sequences_per_step,
        "tokens_per_step": round(tokens_per_step),
        "steps_per_epoch": batches.steps_per_epoch,
        "steps": steps,
        "epochs": round(steps / batches.steps_per_epoch, 3),
        "learning_rate": config.peak_learning_rate,
        "objective": {name: loss.model_dump() for name, loss in config.objective.losses.items()},
        "output": config.output,
    }


def _open(config: TrainConfig) -> Cache:
    # A step may reach from one shuffle window into the next.
    return open_cache(config.cache, max_open_shards=2 * config.shuffle_window)


def _check_device(config: TrainConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this machine has no usable CUDA device; use --device cpu or auto")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    if on_cuda and config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision is bf16, which this CUDA device does not support; use fp32")


def _micro_batches(config: TrainConfig, cache: Cache, rank: int = 0, num_ranks: int = 1) -> MicroBatches:
    return MicroBatches(
        cache,
        batch_sequences=config.batch_sequences,
        accumulation=config.gradient_accumulation,
        seed=config.seed,
        window_shards=config.shuffle_window,
        rank=rank,
        num_ranks=num_ranks,
    )


def _num_steps(config: TrainConfig, batches: MicroBatches) -> int:
    if config.max_steps is not None:
        return config.max_steps
    epochs = 1.0 if config.epochs is None else config.epochs
    return math.ceil(epochs * batches.steps_per_epoch)


def _make_trainer(
    config: TrainConfig,
    cache: Cache,
    module: Distillation,
    progress: bool,
    callbacks: Sequence[TrainerCallback],
) -> tuple[DistillationTrainer, MicroBatches]:
    args = _arguments(config)
    batches = _micro_batches(config, cache, args.process_index, args.world_size)
    args.max_steps = _num_steps(config, batches)
    args.warmup_steps = math.ceil(config.warmup_ratio * args.max_steps)
    trainer = DistillationTrainer(
        module,
        args,
        training_loader(cache, batches, module.student.pad_id, config.data_workers),
        batches,
        callbacks=[*callbacks, *([ProgressBar()] if progress else [])],
    )
    return trainer, batches


def _arguments(config: TrainConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=config.batch_sequences,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        seed=config.seed,
        use_cpu=config.device == "cpu",
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        report_to=config.report_to,
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,  # replaced by a bar of our own
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen, not replaced by the mean of the others
        ddp_find_unused_parameters=False,
    )


def _run(trainer: DistillationTrainer, checkpoint: Path | None) -> float:
    """Train from ``checkpoint`` on; return the seconds it took."""
    started_s = time.perf_counter()
    if checkpoint is not None:
        state = trainer.state.load_from_json(str(checkpoint / STATE_FILE))
        if state.global_step >= trainer.args.max_steps:
            # Interrupted after its last step, before the model was saved.
            trainer.load_checkpoint(checkpoint, state)
            return 0.0
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return time.perf_counter() - started_s


def _finish(config: TrainConfig, trainer: DistillationTrainer, record: RunRecord | None, seconds: float) -> TrainResult:
    history = trainer.state.log_history
    tokens_per_s = trainer.meter.total_positions / seconds if seconds else 0.0
    last = history[-1] if history else {}
    losses = {name: last[name] for name in ("loss", *config.objective.losses) if name in last}
    steps = trainer.state.global_step
    if record is not None:
        record.finish(steps=steps, losses=losses, history=history, seconds=seconds, tokens_per_s=tokens_per_s)
    return TrainResult(Path(config.output), steps, losses, seconds, tokens_per_s)
