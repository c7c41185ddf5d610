"""Everything about a training run that the cache does not know."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kdcache.cache.curriculum import Curriculum
from kdcache.cache.order import NUM_STREAMS
from kdcache.config import Config
from kdcache.losses import ObjectiveConfig
from kdcache.storage.local_store import LocalStoreConfig
from kdcache.students import StudentConfig


class TrainConfig(Config):
    """Everything about a training run that the cache does not know.

    ``batch_sequences`` is per device and micro-batch; a step trains on ``batch_sequences x gradient_accumulation x
    number of processes`` sequences. ``epochs`` (default 1) and ``max_steps`` exclude each other. ``learning_rate``
    defaults to 1e-3 for a fresh student and 3e-4 for a pretrained one. The order of an epoch takes from ``num_streams``
    places of the cache in turn, each of which shuffles ``shuffle_window`` shards: more is better mixed and takes more
    memory. Where the number of processes divides ``num_streams``, each reads its own share of the shards only.
    """

    cache: str
    student: StudentConfig
    output: str
    local_store: LocalStoreConfig = LocalStoreConfig()
    """What is kept on this machine of a remote cache."""
    objective: ObjectiveConfig | None = None
    """What the student learns (default: the objective of the cache's task, for token tasks 0.9 forward_kl and 0.1
    cross_entropy)."""
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
    """Longer gradients are cut to this length; 0 switches that off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` computes in bfloat16 (autocast) and keeps weights and optimiser in the student's dtype."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward and compute the rest again: less memory, about a third slower."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    shuffle_window: int = Field(default=1, ge=1)
    num_streams: int = Field(default=NUM_STREAMS, ge=1)
    where: str | None = None
    """Train only on sequences of which this filter on the per-sequence table is true, such as ``teacher_loss < 5``."""
    curriculum: Curriculum | None = None
    """Easy sequences first; without it the order is shuffled. It reaches all over the cache, not into a window."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=500, ge=1)
    save_total_limit: int = Field(default=2, ge=1)
    data_threads: int = Field(default=1, ge=0)
    """Threads that read and decode ahead of training; 0 reads when a batch is needed."""
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
