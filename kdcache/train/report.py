"""What a training run would do, before it does it."""

from __future__ import annotations

from typing import Any

from kdcache.students import load_student
from kdcache.students.trainer import check_logger
from kdcache.train.config import TrainConfig
from kdcache.train.prepare import micro_batches, num_positions, num_steps, open_training_cache, training_objective


def plan_training(config: TrainConfig) -> dict[str, Any]:
    """Return what `train_student` would do: sizes, steps and tokens. Loads the student, trains nothing."""
    check_logger(config.report_to)
    cache = open_training_cache(config)
    training_objective(config, cache)  # refuses what the cache does not allow
    student = load_student(config.student, cache.manifest, cache.tokenizer_dir())
    batches = micro_batches(config, cache)
    steps = num_steps(config, batches)
    positions = num_positions(config, cache)
    tokens_per_step = positions * min(batches.sequences_per_step / batches.num_sequences, 1.0)
    return {
        "student": type(student.model).__name__,
        "num_parameters": student.num_parameters,
        "teacher": cache.manifest.teacher.name,
        "num_sequences": batches.num_sequences,
        "num_positions": positions,
        "sequences_per_step": batches.sequences_per_step,
        "tokens_per_step": round(tokens_per_step),
        "steps_per_epoch": batches.steps_per_epoch,
        "steps": steps,
        "epochs": round(steps / batches.steps_per_epoch, 3),
        "learning_rate": config.peak_learning_rate,
        "objective": {name: loss.model_dump() for name, loss in config.objective.losses.items()},
        "output": config.output,
    }
