"""Fewer ids from more: the same targets as if the whole distribution had been cut there at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kdcache.cache.truncate import cut_targets
from kdcache.errors import CorruptCacheError
from kdcache.schema import SequenceBatch, Targets, TargetsRecord
from kdcache.transcode.cut import TargetsCutter
from tests.loops import loop
from tests.synthetic import random_targets

V = 60
GRID = (0.5, 2.0, 4.0)
CUTS = {
    "smaller K": (TargetsRecord(top_k=16), TargetsRecord(top_k=3)),
    "one id": (TargetsRecord(top_k=16), TargetsRecord(top_k=1)),
    "from the whole vocabulary": (TargetsRecord(top_k=V), TargetsRecord(top_k=5)),
    "by probability": (TargetsRecord(top_k=16), TargetsRecord(top_k=16, min_prob=0.02)),
    "by mass": (TargetsRecord(top_k=16), TargetsRecord(top_k=16, min_mass=0.7)),
    "by both and K": (TargetsRecord(top_k=16), TargetsRecord(top_k=6, min_prob=0.02, min_mass=0.9)),
    "ragged to smaller K": (TargetsRecord(top_k=16, min_prob=0.01), TargetsRecord(top_k=4, min_prob=0.01)),
    "ragged to stricter": (TargetsRecord(top_k=16, min_prob=0.01), TargetsRecord(top_k=16, min_prob=0.05)),
    "ragged by the other": (
        TargetsRecord(top_k=16, min_prob=0.01),
        TargetsRecord(top_k=9, min_prob=0.01, min_mass=0.8),
    ),
    "nothing": (TargetsRecord(top_k=16), TargetsRecord(top_k=16)),
}


def compare(found: Targets, expected: Targets, atol: float = 2e-6) -> None:
    for name, value in vars(expected).items():
        if value is None:
            assert getattr(found, name) is None, name
        elif np.issubdtype(value.dtype, np.integer):
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
        else:
            np.testing.assert_allclose(getattr(found, name), value, atol=atol, rtol=1e-6, err_msg=name)


@loop("scale", [0.1, 3.0, 20.0])
@loop("temperatures", [(), GRID])
@loop("name", CUTS)
def test_equal_to_a_cut_of_the_whole_distribution(name, temperatures, scale):
    held, wanted = (r.model_copy(update={"temperatures": temperatures}) for r in CUTS[name])
    targets, expected = (random_targets(200, record, V, scale=scale) for record in (held, wanted))
    found, dropped_PK = cut_targets(targets, held, wanted)
    compare(found, expected)
    mass = np.exp(found.logprobs_PK.astype(float)).sum(1) + np.exp(found.log_tail_P.astype(float))
    np.testing.assert_allclose(mass, 1, atol=1e-6)
    before = np.isfinite(targets.logprobs_PK).sum()
    assert dropped_PK.sum() == before - np.isfinite(found.logprobs_PK).sum()
    if name == "nothing":
        assert not dropped_PK.any()


def test_some_of_the_temperatures():
    held = TargetsRecord(top_k=16, temperatures=GRID)
    wanted = TargetsRecord(top_k=4, temperatures=(4.0, 0.5))
    found, _ = cut_targets(random_targets(50, held, V), held, wanted)
    compare(found, random_targets(50, wanted, V))
    none, _ = cut_targets(random_targets(50, held, V), held, TargetsRecord(top_k=4))
    assert none.log_tails_PG is None


def test_a_tail_far_below_what_1_minus_the_head_could_say():
    record, wanted = TargetsRecord(top_k=2), TargetsRecord(top_k=1)
    targets = random_targets(1, record, V)
    targets.logprobs_PK = np.array([[-1e-13, -30.0]], np.float32)
    targets.log_tail_P = np.array([-31.0], np.float32)
    found, _ = cut_targets(targets, record, wanted)
    np.testing.assert_allclose(found.log_tail_P, np.logaddexp(-30, -31), rtol=1e-6)


def test_thresholds_that_hold_already_are_not_applied_to_rounded_numbers():
    record = TargetsRecord(top_k=8, min_prob=0.05, min_mass=0.95)
    targets = random_targets(100, record, V)
    rounded = dataclasses.replace(targets, logprobs_PK=targets.logprobs_PK - np.float32(0.01))
    found, dropped_PK = cut_targets(rounded, record, record)
    np.testing.assert_array_equal(found.num_kept_P, targets.num_kept_P)
    assert not dropped_PK.any()


def test_draws_stay_as_they_are():
    for record in (
        TargetsRecord(kind="sampled", top_k=0, num_samples=9),
        TargetsRecord(kind="hybrid", top_k=3, num_samples=5),
    ):
        targets = random_targets(40, record, V)
        found, _ = cut_targets(targets, record, record)
        np.testing.assert_array_equal(found.samples.ids_PJ, targets.samples.ids_PJ)
        compare(dataclasses.replace(found, samples=None), dataclasses.replace(targets, samples=None), atol=0)


def batch_of(targets: Targets) -> SequenceBatch:
    count = targets.num_positions
    ends = np.array([0, count])
    tokens_T, mask_P = np.zeros(count + 1, np.uint32), np.ones(count, np.uint8)
    return SequenceBatch([7], tokens_T, np.array([0, count + 1]), ends, mask_P, {"targets": targets})


def test_the_prior_gets_what_is_dropped():
    held, wanted = (TargetsRecord(top_k=k, tail_prior=True) for k in (16, 4))
    before = [random_targets(30, held, V, seed=n) for n in range(2)]
    after = [random_targets(30, wanted, V, seed=n) for n in range(2)]

    def outside(parts: list[Targets]) -> np.ndarray:
        """Sum of probabilities outside K, from everything that is known: all ids of the same distributions."""
        whole = [random_targets(30, TargetsRecord(top_k=V), V, seed=n) for n in range(2)]
        total = np.zeros(V)
        for full, part in zip(whole, parts, strict=True):
            kept = np.arange(V) < part.top_k
            np.add.at(total, full.ids_PK[:, ~kept], np.exp(full.logprobs_PK[:, ~kept].astype(float)))
        return total

    cutter = TargetsCutter(held, wanted, V, (outside(before) / 60).astype(np.float32))
    for part in before:
        cutter(batch_of(part))
    taken = cutter.take_tail_sum()
    assert taken.num_positions == 60
    np.testing.assert_allclose(taken.sum_V, outside(after), atol=1e-5)
    assert cutter.take_tail_sum().num_positions == 0
    assert TargetsCutter(held, TargetsRecord(top_k=4), V, None).take_tail_sum() is None


def test_ids_outside_the_vocabulary():
    record = TargetsRecord(top_k=4)
    with pytest.raises(CorruptCacheError, match=r"sequences 7 to 7 keep the id .*, the vocabulary has 30"):
        TargetsCutter(record, record, 30)(batch_of(random_targets(20, record, V)))
