"""What a cache tells the losses once for all of its rows: losses know no caches, and caches know no torch."""

from __future__ import annotations

import torch

from kdcache.cache import Cache
from kdcache.errors import CorruptCacheError
from kdcache.losses import TeacherContext
from kdcache.models.lm_head import LMHead, head_from_bytes


def head_of(cache: Cache) -> LMHead:
    """Return the teacher's LM head, [V, D], of a cache of the kind hidden; raises ``CorruptCacheError``."""
    try:
        head = head_from_bytes(cache.lm_head_file())
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{cache.folder}: {error}") from None
    states = next(a for a in cache.manifest.field(cache.manifest.states_field).arrays if a.name == "states")
    expected = (cache.vocab_size, *states.shape)
    if head.weight_VD.shape != expected:
        found = " x ".join(map(str, head.weight_VD.shape))
        raise CorruptCacheError(
            f"{cache.folder}: the LM head is {found}, expected one row for each of the {expected[0]} ids of the "
            f"vocabulary, as wide as the last hidden states ({expected[1]}); run kdcache verify on the cache"
        )
    return head


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
        head=head_of(cache) if targets.kind == "hidden" else None,
    )
