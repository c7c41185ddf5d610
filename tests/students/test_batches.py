from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from kdcache.students.batches import MicroBatches


def fake_cache(num_sequences):
    lengths = np.random.default_rng(0).integers(1, 50, num_sequences)
    starts = np.linspace(0, num_sequences, 4).astype(np.int64)

    class Cache(SimpleNamespace):
        def __len__(self):
            return num_sequences

    return Cache(shard_starts=starts, lengths_N=lengths, order_key="f")


def steps(num_sequences, batch, accumulation, num_ranks, *, epoch=0, seed=0):
    """The sequences of every step, over all ranks."""
    per_rank = []
    for rank in range(num_ranks):
        batches = MicroBatches(
            fake_cache(num_sequences),
            batch_sequences=batch,
            accumulation=accumulation,
            seed=seed,
            window_shards=2,
            rank=rank,
            num_ranks=num_ranks,
        )
        batches.epoch = epoch
        mine = list(batches)
        assert len(mine) == len(batches)
        assert max(map(len, mine)) <= batch
        per_rank.append([mine[i : i + accumulation] for i in range(0, len(mine), accumulation)])
    assert len({len(mine) for mine in per_rank}) == 1, "every rank takes part in every step"
    return [sorted(s for mine in step for batch in mine for s in batch) for step in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("num_sequences", [1, 7, 8, 9, 24, 101])
@pytest.mark.parametrize(
    ("batch", "accumulation", "num_ranks"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
)
def test_steps_do_not_depend_on_how_they_are_dealt_out(num_sequences, batch, accumulation, num_ranks):
    whole = steps(num_sequences, 8, 1, 1)
    assert Counter(s for step in whole for s in step) == Counter(range(num_sequences)), "each sequence once"

    assert steps(num_sequences, batch, accumulation, num_ranks) == whole


def test_epochs_and_seeds_differ_and_repeat():
    assert steps(40, 8, 1, 1, epoch=1) == steps(40, 8, 1, 1, epoch=1)
    assert steps(40, 8, 1, 1, epoch=1) != steps(40, 8, 1, 1, epoch=0)
    assert steps(40, 8, 1, 1, seed=1) != steps(40, 8, 1, 1, seed=0)
