"""Train a student from a cache; the teacher is never loaded.

The configuration holds what only the user knows (which cache, which student, which objective, how long), never what the
cache knows (teacher, K, codec, tokenizer, lengths). The output directory is a plain Hugging Face model with
``kdcache_run.json``, which says how it was made; its checkpoints are such models too, with what resuming needs. A
resumed run continues at the exact next batch and ends with the weights of an uninterrupted one. Resuming is the same
command again, as for every command that writes; an output with a run of other settings is refused.

One process trains on one device; several, started with ``torchrun`` (or, for GPUs, ``accelerate launch``), share every
step without changing its gradient.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments

from kdcache.cache.batches import MicroBatches
from kdcache.losses import Objective, TermModule
from kdcache.students import Student
from kdcache.students.trained_on import write_trained_on
from kdcache.torch_data import training_batches
from kdcache.train.checkpoints import STATE_FILE, TERMS_FILE, readable_failures, save_student, save_terms, step_of
from kdcache.train.config import TrainConfig
from kdcache.train.module import Distiller
from kdcache.train.prepare import PreparedRun, check_processes, prepare, uses_cpu
from kdcache.train.preview import report_start
from kdcache.train.run_record import OutputLock, RunRecord, check_output, settings_that_decide
from kdcache.train.trainer import DistillationTrainer, ProgressBar


@dataclass(frozen=True)
class TrainResult:
    """The results of a finished run; ``losses`` are means per position over the last logging window, in nats.

    ``data_wait`` is the share of the time, 0 to 1, that the process waited for data.
    """

    output: Path
    steps: int
    losses: dict[str, float]
    seconds: float
    tokens_per_s: float
    data_wait: float = 0.0


def train_student(
    config: TrainConfig,
    *,
    resume: bool = True,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    module: Callable[[Student, Objective], Distiller] = Distiller,
) -> TrainResult:
    """Train a student from a cache and save it under ``config.output``.

    ``module`` joins student and objective; a subclass of `Distiller` may get the teacher's rows from elsewhere.

    If the output holds a run of these settings that has not finished, training resumes from its newest undamaged
    checkpoint (from the beginning if there is none yet); if that run has finished, its result is returned again.
    Without ``resume`` the output must hold no run.

    No update is made with a loss or a gradient that is not finite, and no student is saved whose weights or answers
    are not. Raises ``ConfigError`` when the output holds a run of other settings or anything else, when another process
    trains into it, or when a loss needs what the cache does not hold; ``StudentError`` when the student does not fit
    the cache, the run diverges, all checkpoints are damaged, or a file cannot be written; ``CacheError`` when the cache
    is incomplete, damaged or missing.
    """
    check_output(config.output, resume=resume)
    with OutputLock(config.output) as lock:
        run = prepare(config)
        run.warn_of_rereading()
        run.warn_of_rounding()
        trainer, batches = _make_trainer(run, module(run.student, run.objective), progress, callbacks)
        if trainer.args.should_save:
            lock.acquire()
            check_output(config.output, resume=resume)  # again: another process may have begun and ended meanwhile
        return _train(run, trainer, batches, resume=resume, progress=progress)


def _train(
    run: PreparedRun, trainer: DistillationTrainer, batches: MicroBatches, *, resume: bool, progress: bool
) -> TrainResult:
    config, is_first = run.config, trainer.args.should_save
    recorded = config.model_dump(mode="json")
    record = RunRecord.begin(
        config.output,
        settings=settings_that_decide(recorded, batches.sequences_per_step, trainer.args.max_steps),
        config=recorded,
        cache=run.cache,
        student=run.student,
        resume=resume,
        write=is_first,
        terms=_describe_terms(run.objective),
    )
    speaks = progress and trainer.is_world_process_zero()
    if record.finished is not None:
        if speaks:
            tqdm.write(f"{config.output} holds this run, finished: nothing is trained", file=sys.stderr)
        return TrainResult(Path(config.output), **record.finished)
    checkpoint = trainer.checkpoints.resumed(warn=is_first)
    if is_first:
        write_trained_on(config.output, run.cache, run.chosen_N)
        trainer.checkpoints.clear(0 if checkpoint is None else step_of(checkpoint))
    if speaks:
        if checkpoint is None:
            lines = report_start(run, trainer.module, batches).summary()
        else:
            lines = [f"resuming from {checkpoint}"]
        for line in lines:
            tqdm.write(line, file=sys.stderr)
    seconds = _run(trainer, checkpoint)
    trainer.check_student()
    if is_first:
        with readable_failures(
            Path(config.output), Path(config.output), "the same command saves the student that was trained"
        ):
            save_student(run.student, config.output)
            save_terms(trainer.module, config.output)
    return _finish(run, trainer, record if is_first else None, seconds)


def _make_trainer(
    run: PreparedRun, module: Distiller, progress: bool, callbacks: Sequence[TrainerCallback]
) -> tuple[DistillationTrainer, MicroBatches]:
    args = _arguments(run.config)
    check_processes(args.world_size)
    batches = run.micro_batches(args.process_index, args.world_size)
    args.max_steps = run.num_steps(batches)
    args.warmup_steps = math.ceil(run.config.warmup_ratio * args.max_steps)
    trainer = DistillationTrainer(
        module,
        args,
        training_batches(
            run.cache, batches, run.student.pad_id, fields=module.hidden_fields, threads=run.config.data_threads
        ),
        callbacks=[*callbacks, *([ProgressBar()] if progress else [])],
    )
    return trainer, batches


def _describe_terms(objective: Objective) -> dict[str, Any]:
    """Return what the record of the run says about the terms and their parameters; empty without terms."""
    num_parameters = sum(parameter.numel() for parameter in objective.terms.parameters())
    where = {"file": TERMS_FILE if num_parameters else None, "num_parameters": num_parameters}
    described = {name: cast(TermModule, module).describe() for name, module in objective.terms.items()}
    return {**described, **where} if described else {}


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
        use_cpu=uses_cpu(config),
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
    """Train, from ``checkpoint`` if given; return the seconds it took."""
    started_s = time.perf_counter()
    if checkpoint is not None:
        state = trainer.state.load_from_json(str(checkpoint / STATE_FILE))
        if state.global_step >= trainer.args.max_steps:
            # Interrupted after its last step, before the model was saved.
            trainer.load_checkpoint(checkpoint, state)
            return 0.0
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return time.perf_counter() - started_s


def _finish(run: PreparedRun, trainer: DistillationTrainer, record: RunRecord | None, seconds: float) -> TrainResult:
    history = trainer.state.log_history
    tokens_per_s = trainer.meter.total_tokens / seconds if seconds else 0.0
    data_wait = trainer.data_wait_s / seconds if seconds else 0.0
    last = history[-1] if history else {}
    losses = {name: last[name] for name in ("loss", *run.objective.config.parts) if name in last}
    steps = trainer.state.global_step
    if record is not None:
        results = {"steps": steps, "losses": losses, "seconds": seconds, "tokens_per_s": tokens_per_s}
        record.finish(**results, data_wait=data_wait, history=history)
    return TrainResult(Path(run.config.output), steps, losses, seconds, tokens_per_s, data_wait)
