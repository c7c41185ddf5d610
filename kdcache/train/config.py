"""The settings of a training run; what the cache knows (teacher, codec, tokenizer, task) is not among them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from kdcache.cache.curriculum import Curriculum
from kdcache.cache.order import NUM_STREAMS
from kdcache.config import Config
from kdcache.losses import ObjectiveConfig
from kdcache.storage.local_store import LocalStoreConfig
from kdcache.students import StudentConfig


class TrainConfig(Config):
    """The settings of a training run.

    ``batch_sequences`` is per device and micro-batch; a step trains on ``batch_sequences x gradient_accumulation x
    number of processes`` sequences. ``epochs`` (default 1) and ``max_steps`` exclude each other. ``learning_rate``
    defaults to 1e-3 for a fresh student and 3e-4 for a pretrained one. The order of an epoch interleaves
    ``num_streams`` parts of the cache, each shuffled over ``shuffle_window`` shards: larger numbers mix better and take
    more memory. If ``num_streams`` is a multiple of the number of processes, each process reads its own shards only.
    """

    cache: str
    student: StudentConfig
    output: str
    local_store: LocalStoreConfig = LocalStoreConfig()
    """Where shards of a remote cache are stored on this machine, and how many bytes of them."""
    objective: ObjectiveConfig | None = None
    """Losses and terms with their weights (default: those of the cache's task)."""
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(default=None, ge=1)
    batch_sequences: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    adam_beta2: float = Field(default=0.95, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Gradients are clipped to this norm; 0 disables clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: compute in bfloat16 (autocast); weights and optimiser stay in the student's dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    shuffle_window: int = Field(default=1, ge=1)
    num_streams: int = Field(default=NUM_STREAMS, ge=1)
    where: str | None = None
    """Train only on sequences that match this filter on the per-sequence table, such as ``teacher_loss < 5``."""
    curriculum: Curriculum | None = None
    """Easy sequences first (default: shuffled). It reads from all shards at once, not from a window."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=500, ge=1)
    save_total_limit: int = Field(default=2, ge=1)
    data_threads: int = Field(default=1, ge=0)
    """Threads that read and decode ahead of training; 0: read when a batch is needed."""
    report_to: str = "none"
    """A logger of the Trainer, such as ``tensorboard`` or ``wandb``."""

    @field_validator("output")
    @classmethod
    def _is_a_directory_here(cls, output: str) -> str:
        if not output.strip() or "://" in output:
            raise ValueError(
                f"give a directory on this machine for checkpoints and the student, and copy the student to an object "
                f"store afterwards; found {output!r}"
            )
        return output

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
