"""What comes before the first step, shared by the run and by its plan: the cache, the device, the steps."""

from __future__ import annotations

import math

import torch

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError
from kdcache.students.batches import MicroBatches
from kdcache.train.config import TrainConfig


def open_training_cache(config: TrainConfig) -> Cache:
    """Open the cache with room for the shards that a step may reach into."""
    # A step may reach from one shuffle window into the next.
    return open_cache(config.cache, max_open_shards=2 * config.shuffle_window)


def check_device(config: TrainConfig) -> None:
    """Raise ``ConfigError`` when device and precision are not to be had on this machine."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this machine has no usable CUDA device; use --device cpu or auto")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    if on_cuda and config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision is bf16, which this CUDA device does not support; use fp32")


def micro_batches(config: TrainConfig, cache: Cache, rank: int = 0, num_ranks: int = 1) -> MicroBatches:
    """Return the micro-batches of one rank."""
    return MicroBatches(
        cache,
        batch_sequences=config.batch_sequences,
        accumulation=config.gradient_accumulation,
        seed=config.seed,
        window_shards=config.shuffle_window,
        rank=rank,
        num_ranks=num_ranks,
    )


def num_steps(config: TrainConfig, batches: MicroBatches) -> int:
    """Return how many optimiser steps the run has."""
    if config.max_steps is not None:
        return config.max_steps
    epochs = 1.0 if config.epochs is None else config.epochs
    return math.ceil(epochs * batches.steps_per_epoch)
