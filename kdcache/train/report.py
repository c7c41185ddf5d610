"""What a training run would do, before it does it."""

from __future__ import annotations

from typing import Any

from kdcache.losses import Objective
from kdcache.students import load_student
from kdcache.students.trainer import check_logger
from kdcache.teaching import context_of
from kdcache.train.config import TrainConfig
from kdcache.train.prepare import micro_batches, num_steps, open_training_cache


def plan_training(config: TrainConfig) -> dict[str, Any]:
    """Return what `train_student` would do: sizes, steps and tokens. Loads the student, trains nothing."""
    check_logger(config.report_to)
    cache = open_training_cache(config)
    Objective(config.objective, context=context_of(cache))  # refuses what the cache does not allow
    student = load_student(config.student, cache.manifest, cache.tokenizer_dir())
    batches = micro_batches(config, cache)
    steps = num_steps(config, batches)
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
