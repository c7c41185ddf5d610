"""Any targets from the last hidden state: the teacher's LM head gives its logits back, chunk by chunk.

The states go through the head in its own dtype, as they did in the teacher, and through the very code that reduces a
running teacher's logits. What the source knows exactly, the log-probability of the gold token and the entropy, is
taken from it: its states may be rounded. Samples depend on the seed and on the source's number of the sequence, so a
sequence has the samples that a dump would have given it, however many others are left out.

This module needs torch; nothing imports it before hidden states are really turned into targets.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from kdcache.cache import Cache
from kdcache.cache.tail_prior import TailSum
from kdcache.errors import CorruptCacheError
from kdcache.losses.from_cache import head_of
from kdcache.models.lm_head import BufferedHead
from kdcache.models.loading import pick_device
from kdcache.schema import SequenceBatch, Targets, TargetsRecord
from kdcache.tasks import task_of
from kdcache.teachers.reduce import NonFiniteLogitsError, TargetReducer
from kdcache.teachers.samples import sample_uniforms


class HeadKeeper:
    """Makes targets of ``wanted`` from the hidden states of ``cache``."""

    def __init__(self, cache: Cache, wanted: TargetsRecord, device: str) -> None:
        self._where, self._wanted, self._device = str(cache.folder), wanted, pick_device(device)
        self._task = task_of(cache.manifest.task)
        self._head = BufferedHead(head_of(cache).to(self._device))
        self._keep = TargetReducer(wanted)

    @torch.inference_mode()
    def __call__(self, batch: SequenceBatch) -> Targets:
        """Return the targets of a batch of the source."""
        states_PD = torch.from_numpy(batch.hidden["last"]).to(self._device, self._head.head.weight_VD.dtype)
        labels_P = torch.from_numpy(self._task.labels(batch.sequences()))
        lengths_N, samples = np.diff(batch.position_offsets_N1), self._wanted.num_samples
        uniforms_PN = sample_uniforms(self._wanted.seed, batch.indices, lengths_N, samples) if samples else None
        try:
            targets = self._keep(partial(self._head.logits, states_PD), labels_P.to(self._device), uniforms_PN)
        except NonFiniteLogitsError as error:
            number = int(np.searchsorted(batch.position_offsets_N1, error.row, side="right")) - 1
            raise CorruptCacheError(
                f"{self._where}: the LM head makes NaN or infinite logits of the states of sequence "
                f"{batch.indices[number]}; kdcache verify --deep says whether they are damaged"
            ) from None
        targets.gold_logprob_P, targets.entropy_P = batch.targets.gold_logprob_P, batch.targets.entropy_P
        return targets

    def take_tail_sum(self) -> TailSum | None:
        """Return what all rows since the last call add to the tail prior; None where the targets have none."""
        found = self._keep.take_tail_sum()
        return None if found is None else TailSum(*found)
