"""The batches of a cache as PyTorch sees them: those of the Trainer, in its order, resumed to the sample."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import kdcache
from kdcache.errors import CacheError, ConfigError
from kdcache.torch_data import to_tensors


@pytest.fixture
def cache(dumped: Path):
    return kdcache.open_cache(str(dumped))


def same(found, expected) -> bool:
    found, expected = list(found), list(expected)
    return len(found) == len(expected) and all(
        set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(found, expected, strict=True)
    )


def test_batches_are_those_that_are_read(cache) -> None:
    settings = {"seed": 3, "fields": ["hidden-1"], "top_k": 2, "where": "num_positions > 3"}
    read = [to_tensors(batch, pad_id=7) for batch in cache.batches(4, **settings)]
    data = kdcache.to_torch(cache, 4, pad_id=7, **settings)
    assert isinstance(data, IterableDataset)
    assert len(data) == len(read)
    assert same(data, read)
    assert read[0]["teacher_ids"].shape[1] == 2
    assert read[0]["hidden-1"].shape[0] == len(read[0]["labels"])


def test_epochs_differ_and_come_back(cache) -> None:
    data = kdcache.to_torch(cache, 4)
    first, second = list(data), list(data)
    assert not same(first, second)
    data.set_epoch(0)
    assert same(data, first)
    assert data.wait_s > 0


def test_a_state_goes_on_at_the_next_batch(cache) -> None:
    data = kdcache.to_torch(cache, 4, seed=1)
    batches = iter(data)
    next(batches), next(batches)
    state = data.state_dict()
    assert state == {"epoch": 0, "next_sample": 8}
    resumed = kdcache.to_torch(cache, 4, seed=1)
    resumed.load_state_dict(state)
    assert same(resumed, batches)
    with pytest.raises(ConfigError, match="next_sample"):
        resumed.load_state_dict({"epoch": 0, "next_sample": 10_000})


def test_in_a_loader_of_pytorch(cache) -> None:
    data = kdcache.to_torch(cache, 4)
    loader = DataLoader(data, batch_size=None)
    assert len(loader) == len(data)
    assert same(loader, kdcache.to_torch(cache, 4))
    list(itertools.islice(loader, 1))
    assert data.state_dict() == {"epoch": 1, "next_sample": 4}


def test_ranks_share_out_an_epoch(cache) -> None:
    mine = [kdcache.to_torch(cache, 2, rank=rank, num_ranks=2) for rank in range(2)]
    counts = [sum(batch["loss_mask"].sum() for batch in data) for data in mine]
    assert sum(counts) == sum(batch["loss_mask"].sum() for batch in kdcache.to_torch(cache, 4))


def test_worker_processes_are_refused(cache) -> None:
    loader = DataLoader(kdcache.to_torch(cache, 4), batch_size=None, num_workers=1)
    with pytest.raises(ConfigError, match="num_workers=0"):
        next(iter(loader))


def test_mistakes(cache) -> None:
    with pytest.raises(CacheError, match="top_k 7"):
        next(iter(kdcache.to_torch(cache, top_k=7)))
    with pytest.raises(TypeError, match="shufle"):
        kdcache.to_torch(cache, shufle=True)
    with pytest.raises(ConfigError, match="batch_sequences"):
        kdcache.to_torch(cache, 0)
