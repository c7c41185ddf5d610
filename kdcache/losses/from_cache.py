"""Build what the losses need from a cache: its `TeacherContext`, the LM head, and the bounds of selections."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.losses import ObjectiveConfig, TeacherContext, TeacherRows, incompatibility
from kdcache.losses.selection import MEASURES
from kdcache.models.lm_head import LMHead, head_from_bytes
from kdcache.tasks import task_of
from kdcache.torch_data import to_tensors

#: Most positions, about, on which shares are measured: the share that a bound selects is then right to 0.001.
SAMPLE_POSITIONS = 200_000
#: Most shards that they come from: reading a sequence reads its whole shard.
_SAMPLE_SHARDS = 16
_READ_POSITIONS = 8192


def head_of(cache: Cache) -> LMHead:
    """Return the teacher's LM head, [V, D], of a cache of the kind hidden; raises ``CorruptCacheError``."""
    try:
        head = head_from_bytes(cache.lm_head_file())
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{cache.folder}: {error}") from None
    states = next(a for a in cache.manifest.field(cache.manifest.states_field).arrays if a.name == "states")
    expected = (cache.manifest.num_ids, *states.shape)
    if head.weight_VD.shape != expected:
        found = " x ".join(map(str, head.weight_VD.shape))
        raise CorruptCacheError(
            f"{cache.folder}: the LM head is {found}, expected one row for each of the {expected[0]} ids of the "
            f"vocabulary, as wide as the last hidden states ({expected[1]}); run kdcache verify on the cache"
        )
    return head


def context_of(cache: Cache) -> TeacherContext:
    """Return the facts about all positions of ``cache``, with its tail prior and the teacher's LM head if stored."""
    targets = cache.manifest.targets
    prior_V = cache.tail_prior_V
    return TeacherContext(
        kind=targets.kind,
        vocab_size=None if targets.kind == "outputs" else cache.manifest.num_ids,  # numbers have no ids
        is_ragged=targets.is_ragged,
        temperatures=targets.temperatures,
        prior_V=None if prior_V is None else torch.from_numpy(prior_V),
        head=head_of(cache) if targets.kind == "hidden" else None,
        num_layers=cache.manifest.teacher.num_layers or 0,
        layer_widths=cache.manifest.layer_widths,
        num_kept=targets.top_k,
        outputs=cache.manifest.outputs,
        scalars=targets.scalars,
        probabilities=targets.probabilities,
    )


def resolve_selection(
    objective: ObjectiveConfig, cache: Cache, chosen_N: NDArray[np.int64] | None = None
) -> ObjectiveConfig:
    """Return ``objective`` with every selected share of positions turned into a bound on their values.

    Measured on the valid positions of the sequences ``chosen_N`` (default: all): on all of them, or on a fixed,
    evenly spread sample of about `SAMPLE_POSITIONS`. So the bounds are the same on every rank and in a resumed run.
    Raises ``ConfigError`` when no position is valid, or the cache does not have the measure.
    """
    if not objective.shares:
        return objective
    context = context_of(cache)
    for name, part in objective.parts.items():
        problem = incompatibility(part, context) if part.select is not None else None
        if problem is not None:  # its measure may not be in the cache
            raise ConfigError(f"{name}: {problem}")
    values: dict[str, list[torch.Tensor]] = {by: [] for by in sorted(objective.shares)}
    for rows in _rows_of(cache, _sample(cache, np.arange(len(cache)) if chosen_N is None else np.sort(chosen_N))):
        for by, parts in values.items():
            parts.append(MEASURES[by](rows)[rows.loss_mask_P])
    return objective.resolve({by: torch.cat(parts) for by, parts in values.items()})


def _sample(cache: Cache, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return an evenly spread sample of ``sequences``, in ascending order."""
    if cache.lengths_N[sequences].sum() <= SAMPLE_POSITIONS:
        return sequences
    shards = np.searchsorted(cache.shard_starts, sequences, side="right")
    sequences = sequences[np.isin(shards, _spread(np.unique(shards), _SAMPLE_SHARDS))]
    num_positions = int(cache.lengths_N[sequences].sum())
    return _spread(sequences, math.ceil(len(sequences) * min(SAMPLE_POSITIONS / num_positions, 1.0)))


def _spread(items: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return ``count`` evenly spread items, or all if there are fewer."""
    return items[np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(np.int64)]


def _rows_of(cache: Cache, sequences: NDArray[np.int64]) -> Iterator[TeacherRows]:
    num_reads = math.ceil(int(cache.lengths_N[sequences].sum()) / _READ_POSITIONS)
    for piece in np.array_split(sequences, max(num_reads, 1)):
        if len(piece):
            yield TeacherRows.from_batch(to_tensors(cache.read(piece), 0, task_of(cache.manifest.task)))
