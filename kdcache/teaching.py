"""What a cache tells the losses once for all of its rows: losses know no caches, and caches know no torch."""

from __future__ import annotations

import torch

from kdcache.cache import Cache
from kdcache.losses import TeacherContext
from kdcache.models.lm_head import head_from_bytes


def context_of(cache: Cache) -> TeacherContext:
    """Return what ``cache`` says about all rows, with its tail prior and the teacher's LM head where it has them."""
    targets = cache.manifest.targets
    prior_V = cache.tail_prior_V
    return TeacherContext(
        kind=targets.kind,
        vocab_size=cache.vocab_size,
        is_ragged=targets.is_ragged,
        temperatures=targets.temperatures,
        prior_V=None if prior_V is None else torch.from_numpy(prior_V),
        head=head_from_bytes(cache.lm_head_file()) if targets.kind == "hidden" else None,
    )
