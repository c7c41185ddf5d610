from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np

from kdcache.cache.batches import MicroBatches
from kdcache.cache.curriculum import Curriculum, PacedOrder
from kdcache.cache.order import ShuffledOrder
from tests.loops import loop


def fake_cache(num_sequences):
    lengths = np.random.default_rng(0).integers(1, 50, num_sequences)
    starts = np.linspace(0, num_sequences, 4).astype(np.int64)

    class Cache(SimpleNamespace):
        def __len__(self):
            return num_sequences

    return Cache(shard_starts=starts, sizes_N=lengths, order_key="f")


def order_of(cache, kind, seed, size):
    shuffled = ShuffledOrder(cache.shard_starts, seed, 2, cache.order_key)
    if kind == "shuffled":
        return shuffled
    if kind == "chosen":
        return dataclasses.replace(shuffled, chosen_N=np.arange(0, len(cache), 3))
    return PacedOrder(
        Curriculum(pacing=kind), np.arange(len(cache)), num_steps=20, sequences_per_step=size, name=f"f/{seed}"
    )


def steps(num_sequences, batch, accumulation, num_ranks, *, epoch=0, seed=0, kind="shuffled"):
    """The sequences of every step, over all ranks."""
    per_rank = []
    cache = fake_cache(num_sequences)
    for rank in range(num_ranks):
        order = order_of(cache, kind, seed, batch * accumulation * num_ranks)
        per_rank.append(dealt_to(rank, cache, order, batch, accumulation, num_ranks, epoch))
    assert len({len(mine) for mine in per_rank}) == 1, "every rank takes part in every step"
    return [sorted(s for mine in step for batch in mine for s in batch) for step in zip(*per_rank, strict=True)]


def dealt_to(rank, cache, order, batch, accumulation, num_ranks, epoch):
    batches = MicroBatches(
        cache, order, batch_sequences=batch, accumulation=accumulation, rank=rank, num_ranks=num_ranks
    )
    mine = list(batches.steps(epoch))
    assert len(mine) * accumulation == len(batches) == batches.steps_per_epoch * accumulation
    assert all(len(micro_batches) == accumulation for micro_batches in mine)
    assert max(len(micro_batch) for step in mine for micro_batch in step) <= batch
    return mine


@loop("num_sequences", [1, 7, 8, 9, 24, 101])
@loop(("batch", "accumulation", "num_ranks"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)])
@loop("kind", ["shuffled", "chosen", "root", "sorted"])
def test_steps_do_not_depend_on_how_they_are_dealt_out(num_sequences, batch, accumulation, num_ranks, kind):
    whole = steps(num_sequences, 8, 1, 1, kind=kind)
    chosen = range(0, num_sequences, 3 if kind == "chosen" else 1)
    if kind != "root":
        assert Counter(s for step in whole for s in step) == Counter(chosen), "each sequence once"

    assert steps(num_sequences, batch, accumulation, num_ranks, kind=kind) == whole


@loop("kind", ["shuffled", "chosen", "root"])
def test_epochs_and_seeds_differ_and_repeat(kind):
    assert steps(40, 8, 1, 1, epoch=1, kind=kind) == steps(40, 8, 1, 1, epoch=1, kind=kind)
    assert steps(40, 8, 1, 1, epoch=1, kind=kind) != steps(40, 8, 1, 1, epoch=0, kind=kind)
    assert steps(40, 8, 1, 1, seed=1, kind=kind) != steps(40, 8, 1, 1, seed=0, kind=kind)
