"""Batches of a cache as tensors: what reaches the device. Which sequences they hold is `kdcache.cache.batches`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import Cache
from kdcache.cache.batches import Batches, MicroBatches
from kdcache.schema import SequenceBatch
from kdcache.tasks import TASKS, Task, task_of
from kdcache.tasks.causal_lm import CausalLM


def training_batches(
    cache: Cache, micro_batches: MicroBatches, pad_id: int, **reading: Any
) -> Batches[dict[str, Tensor]]:
    """Return collated micro-batches as CPU tensors, read ahead; ``reading`` are the settings of `Batches`."""
    task = task_of(cache.manifest.task)
    make = partial(to_tensors, pad_id=pad_id, task=task, pin=torch.cuda.is_available())
    return Batches(cache, micro_batches, make=make, **reading)


def count_tokens(batch: Mapping[str, Tensor]) -> int | Tensor:
    """Return how many tokens a collated batch has without padding: a number on its device, which nobody waits for."""
    # Packed documents are kept apart without a mask, and their padding has no rows.
    return batch["attention_mask"].sum() if "attention_mask" in batch else batch["labels"].numel()


def to_tensors(
    batch: SequenceBatch, pad_id: int, task: Task = TASKS[CausalLM.name], *, pin: bool = False
) -> dict[str, Tensor]:
    """Collate decoded sequences of a ``task`` into tensors (see ``kdcache.tasks.Task.collate`` for names and shapes).

    ``pin`` puts them into memory that a CUDA device copies from by itself.
    """
    # A view of an encoded array may be read-only, which torch.from_numpy only warns about.
    tensors = {
        name: torch.from_numpy(np.require(value, requirements="W"))
        for name, value in task.collate(batch, pad_id).items()
    }
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin else tensors
