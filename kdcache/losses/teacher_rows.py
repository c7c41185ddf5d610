"""What the teacher says about a batch, as tensors: one row per real position, padding already removed.

A plain record, so that losses know nothing of caches, collators or devices. What all rows of a cache have in common
is in `TeacherContext`. Shape suffixes: P flat positions, K kept ids, G grid temperatures, D width of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdcache.errors import ConfigError

BATCH_KEYS = {
    "ids_PK": "teacher_ids",
    "logprobs_PK": "teacher_logprobs",
    "log_tail_P": "teacher_log_tail",
    "entropy_P": "teacher_entropy",
    "labels_P": "labels",
    "loss_mask_P": "loss_mask",
}
OPTIONAL_BATCH_KEYS = {
    "log_tails_PG": "teacher_log_tails",
    "hidden_PD": "teacher_hidden",
    "gold_logprob_P": "teacher_gold_logprob",
}


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's top K of P positions with what the losses need beside it.

    ``ids_PK`` int64, distinct within a row, most probable first; ``logprobs_PK`` their log-probabilities over the
    whole vocabulary; ``log_tail_P`` the log of the mass outside them (-inf: none); ``entropy_P`` the entropy of the
    full distribution, in nats; ``labels_P`` int64 tokens or classes of the corpus; ``loss_mask_P`` bool, True where a
    position counts.

    Where the cache's `TeacherContext` says that rows are padded, places that stand for nothing repeat the row's first
    id with log-probability -inf. Some caches have more: ``log_tails_PG``, the log of the mass outside the kept ids at
    each temperature of the grid, and ``hidden_PD``, the teacher's last hidden state. ``gold_logprob_P``, the teacher's
    log-probability of the label, is only needed where positions are selected by it.
    """

    ids_PK: Tensor
    logprobs_PK: Tensor
    log_tail_P: Tensor
    entropy_P: Tensor
    labels_P: Tensor
    loss_mask_P: Tensor
    log_tails_PG: Tensor | None = None
    hidden_PD: Tensor | None = None
    gold_logprob_P: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: Mapping[str, Tensor]) -> TeacherRows:
        """Take the rows out of a collated training batch; raises ``ConfigError`` naming the keys that are missing."""
        missing = [key for key in BATCH_KEYS.values() if key not in batch]
        if missing:
            raise ConfigError(
                f"a training batch must hold {', '.join(BATCH_KEYS.values())}; {', '.join(missing)} not found among "
                f"{', '.join(batch) or 'no keys'}. Use the collator of the cache's task, and with a Trainer "
                "of your own set remove_unused_columns=False"
            )
        return cls(**{name: batch[key] for name, key in (BATCH_KEYS | OPTIONAL_BATCH_KEYS).items() if key in batch})

    @property
    def num_positions(self) -> int:
        """Number of rows, P."""
        return self.ids_PK.shape[0]

    @property
    def top_k(self) -> int:
        """Number of kept ids per row, K."""
        return self.ids_PK.shape[1]

    def require(self, name: str) -> Tensor:
        """Return an optional part of the rows; raises ``ConfigError`` naming its key when the batch had none."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ConfigError(
                f"the loss needs {OPTIONAL_BATCH_KEYS[name]} in every training batch, found none; read that part of "
                "the cache too, and use the collator of the cache's task"
            )
        return value

    def slice(self, start: int, stop: int) -> TeacherRows:
        """Return rows ``start`` to ``stop`` (views)."""
        return self._each(lambda tensor: tensor[start:stop])

    def select(self, rows: Tensor) -> TeacherRows:
        """Return the rows with the given int64 indices, in that order."""
        return self._each(lambda tensor: tensor.index_select(0, rows))

    def to(self, device: torch.device | str) -> TeacherRows:
        """Return the rows on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def with_dtype(self, dtype: torch.dtype) -> TeacherRows:
        """Return the rows with their log-probabilities and entropies in ``dtype``."""
        return self._each(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TeacherRows:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TeacherRows(**{name: change(value) for name, value in values.items() if value is not None})
