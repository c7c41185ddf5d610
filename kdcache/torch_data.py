"""Batches of a cache as tensors, and a cache as a PyTorch data set for training loops of your own.

A batch is a dict of CPU tensors, whose names and shapes are those of `kdcache.tasks.Task.collate`. Which sequences it
holds is decided in `kdcache.cache.batches`. The Trainer, reports and evaluation read the same batches as `to_torch`.

Reading is ahead of its use, by threads that share one copy of the open shards. `TorchBatches` passes ``state_dict`` and
``load_state_dict`` on, which is all that PyTorch's stateful loaders ask for. It rejects worker processes: each would
open shards of its own and send decoded batches, which are larger than encoded ones, and what workers have read ahead is
not what the loop has used, so a saved state would skip batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from kdcache.cache import Cache
from kdcache.cache.batches import Batches, MicroBatches
from kdcache.errors import ConfigError
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
    """Return the number of tokens of a collated batch without padding, on its device so that nothing waits for it."""
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


class TorchBatches(IterableDataset[dict[str, Tensor]]):
    """Batches of a cache as dicts of tensors, an epoch each time they are iterated. Make one with `to_torch`."""

    def __init__(self, batches: Batches[dict[str, Tensor]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if get_worker_info() is not None:
            raise ConfigError(
                "a cache is read by threads, not by the worker processes of a DataLoader: use num_workers=0, and "
                "threads=2 or more in to_torch() if one is too slow"
            )
        return iter(self._batches)

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has waited for data so far."""
        return self._batches.wait_s

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the next one, from its beginning, unless a state within it was loaded."""
        self._batches.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the state after the batches that were returned so far, without those that were only read ahead."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; raises ``ConfigError`` when it does not match this dataset."""
        self._batches.load_state_dict(state)


def to_torch(
    cache: Cache,
    batch_sequences: int = 8,
    *,
    pad_id: int = 0,
    fields: Sequence[str] = (),
    top_k: int | None = None,
    threads: int = 1,
    ahead: int = 2,
    **order: Any,
) -> TorchBatches:
    """Return a cache as an iterable data set of collated batches, as CPU tensors (pinned if there is CUDA).

    Settings are those of `Cache.batches`; ``pad_id`` pads ``input_ids`` to the longest sequence. Names and shapes
    of the tensors are those of `kdcache.tasks.Task.collate`. A ``DataLoader`` around it needs ``batch_size=None``
    and ``num_workers=0``; with workers its iteration raises ``ConfigError``.
    """
    dealt = cache.batches(batch_sequences, **order).micro_batches
    batches = training_batches(cache, dealt, pad_id, fields=fields, top_k=top_k, threads=threads, ahead=ahead)
    return TorchBatches(batches)
