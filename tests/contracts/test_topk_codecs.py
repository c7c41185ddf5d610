from __future__ import annotations

import json

import numpy as np
import pytest

from kdcache.codecs import TOPK_CODECS, TargetsCodec, topk_codec
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.schema import Targets, TargetsRecord
from tests.contracts.matching import ERRORS, check_head, in_order_of, scalar_error
from tests.loops import loop
from tests.synthetic import random_targets, targets_of

CASES = {
    "usual": random_targets(40, 8, 100),
    "k=1": random_targets(10, 1, 100),
    "k=2": random_targets(10, 2, 100),
    "k=V": random_targets(10, 12, 12),
    "V=1": random_targets(3, 1, 1),
    "one row": random_targets(1, 8, 100),
    "no rows": random_targets(0, 8, 100),
    "flat": random_targets(10, 8, 100, scale=1e-3),
    "all equal": random_targets(10, 8, 100, scale=0),
    "peaked": random_targets(10, 8, 100, scale=40.0),
    "70,000 ids": random_targets(3, 8, 70_000),
    "262,144 ids": random_targets(2, 8, 262_144),
    "65,536 ids": random_targets(2, 8, 65_536),
    "more rows than a block": random_targets(4099, 3, 20),
}
VOCAB_SIZES = {
    "k=V": 12,
    "V=1": 1,
    "70,000 ids": 70_000,
    "262,144 ids": 262_144,
    "65,536 ids": 65_536,
    "more rows than a block": 20,
}
codecs = loop("codec", [topk_codec({"name": name}) for name in TOPK_CODECS], ids=list(TOPK_CODECS))
cases = loop("case", CASES)


def mass(targets: Targets) -> np.ndarray:
    return np.exp(targets.logprobs_PK.astype(np.float64)).sum(1) + np.exp(targets.log_tail_P.astype(np.float64))


def through(codec, targets, vocab_size) -> Targets:
    """Encode and decode, as a cache of top-k targets does."""
    whole = TargetsCodec(codec, TargetsRecord(top_k=targets.top_k), vocab_size)
    return whole.decode(whole.open(whole.encode(targets)))


def test_every_codec_is_here():
    assert list(TOPK_CODECS) == ["compact", "bf16", "fp16", "exact"]
    assert set(ERRORS) == set(TOPK_CODECS)


@codecs
@cases
def test_encoded_arrays_are_the_described_ones(codec, case):
    targets, vocab_size = CASES[case], VOCAB_SIZES.get(case, 100)
    encoded = codec.encode(targets.ids_PK, targets.logprobs_PK, vocab_size)
    described = {array.name: array for array in codec.arrays(targets.top_k, vocab_size)}
    assert set(encoded) == set(described)
    for name, array in described.items():
        assert encoded[name].dtype == array.dtype, name
        assert encoded[name].shape[1:] == array.shape, name
        if array.rows == "positions":
            assert len(encoded[name]) == targets.num_positions, name
        else:
            assert array.rows == "table"


@codecs
@cases
def test_round_trip_is_a_distribution_within_the_stated_error(codec, case):
    targets, vocab_size = CASES[case], VOCAB_SIZES.get(case, 100)
    decoded = through(codec, targets, vocab_size)
    check_head(codec, decoded, targets)
    assert decoded.ids_PK.dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)
    for name, values in vars(decoded).items():
        assert name == "ids_PK" or values is None or values.dtype == np.float32
    np.testing.assert_allclose(mass(decoded), 1, atol=1e-5)
    for name in ("log_tail_P", "gold_logprob_P", "entropy_P"):
        np.testing.assert_allclose(getattr(decoded, name), getattr(targets, name), rtol=scalar_error(codec), atol=1e-7)


@loop("name", [name for name in TOPK_CODECS if name != "compact"])
@cases
def test_codecs_of_logprobs_keep_the_order_of_ids(name, case):
    targets = CASES[case]
    decoded = through(topk_codec({"name": name}), targets, VOCAB_SIZES.get(case, 100))
    np.testing.assert_array_equal(decoded.ids_PK, targets.ids_PK)


@loop("scale", [1e-3, 0.1, 3.0])
def test_compact_sorts_ids_of_one_grid_point_by_frequency(scale):
    targets = random_targets(300, 12, 40, scale=scale)
    codec = topk_codec({"name": "compact"})
    encoded = codec.encode(targets.ids_PK, targets.logprobs_PK, 40)
    ids_PK, _ = codec.decode(encoded, targets.log_tail_P)
    counts = np.bincount(targets.ids_PK.reshape(-1), minlength=40)
    tied = encoded["topk_gaps"][:, 2:] == 0  # the first column stays what it was
    before, after = ids_PK[:, 1:-1][tied], ids_PK[:, 2:][tied]
    assert len(before) > 10
    # Roughly by frequency: never after an id that is twice as frequent.
    assert (counts[after] < 2 * counts[before]).all()


@codecs
@loop("gap", [15.9, 16.0, 40.0, 500.0, 1e4])
def test_huge_gaps(codec, gap):
    logits = np.zeros((1, 6))
    logits[0, 2:] = -gap
    targets = targets_of(logits, np.array([5]), 4)
    decoded = through(codec, targets, 6)
    found = in_order_of(targets.ids_PK, decoded.ids_PK, decoded.logprobs_PK)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found), np.exp(targets.logprobs_PK), atol=2e-3)
    np.testing.assert_allclose(mass(decoded), 1, atol=1e-5)


def test_a_step_that_is_cut_ties_as_a_reader_sees_it():
    # 20 and 20.01 nats below the first id are both cut to the longest step; so are the next two from there.
    logprobs = np.array([[0, -20, -20.01, -60, -60.5]], np.float32)
    logprobs -= np.log(np.exp(logprobs).sum())
    ids = np.array([[7, 9, 3, 8, 1]], np.int32)
    codec = topk_codec({"name": "compact"})
    decoded_ids, decoded = codec.decode(codec.encode(ids, logprobs, 10), np.array([-np.inf], np.float32))
    found = in_order_of(ids, decoded_ids, decoded)
    np.testing.assert_allclose(-np.diff(found[0]), [255 / 16, 0, 255 / 16, 0.5], atol=1e-4)


@codecs
@loop("tail", [0.0, 1e-30, 1e-6, 0.5, 1 - 1e-4, 1 - 1e-7])
def test_tails_from_nothing_to_nearly_everything(codec, tail):
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.array([tail]))
    targets = Targets(
        ids_PK=np.array([[3, 1]], np.int32),
        logprobs_PK=np.log((1 - tail) * np.array([[0.75, 0.25]])).astype(np.float32),
        log_tail_P=log_tail.astype(np.float32),
        gold_logprob_P=np.array([-1.0], np.float32),
        entropy_P=np.array([1.0], np.float32),
    )
    decoded = through(codec, targets, 10)
    np.testing.assert_allclose(mass(decoded), 1, atol=1e-5)
    assert not np.isnan(decoded.logprobs_PK).any()
    np.testing.assert_allclose(np.exp(decoded.log_tail_P), [tail], rtol=2e-2, atol=1e-7)
    ratio = decoded.logprobs_PK[0, 0] - decoded.logprobs_PK[0, 1]
    assert abs(ratio - np.log(3)) < (0.07 if tail > 0.9 else 0.04)


@codecs
def test_an_id_that_the_teacher_rules_out(codec):
    targets = targets_of(np.array([[0.0, -np.inf, 1.0, -np.inf]]), np.array([2]), 4)
    targets.logprobs_PK = np.maximum(targets.logprobs_PK, np.float32(-1e4))
    decoded = through(codec, targets, 4)
    found = in_order_of(targets.ids_PK, decoded.ids_PK, decoded.logprobs_PK)
    np.testing.assert_allclose(np.exp(found), np.exp(targets.logprobs_PK), atol=5e-3)


def test_exact_is_exact_to_the_bit():
    codec = topk_codec({"name": "exact"})
    for case, targets in CASES.items():
        decoded = through(codec, targets, VOCAB_SIZES.get(case, 100))
        for name in ("logprobs_PK", "log_tail_P", "gold_logprob_P", "entropy_P"):
            assert getattr(decoded, name).tobytes() == getattr(targets, name).tobytes(), (case, name)


def test_errors_of_the_compact_codec_do_not_add_up_along_k():
    targets = random_targets(200, 500, 1000)
    decoded = through(topk_codec({"name": "compact"}), targets, 1000)
    error = in_order_of(targets.ids_PK, decoded.ids_PK, decoded.logprobs_PK) - targets.logprobs_PK
    assert np.abs(error).max() < 2 * 0.5 / 16


@loop("grid", [1, 8, 32, 64])
def test_a_finer_grid_is_closer(grid):
    targets = random_targets(50, 8, 100)
    decoded = through(topk_codec({"name": "compact", "grid": grid}), targets, 100)
    error = in_order_of(targets.ids_PK, decoded.ids_PK, decoded.logprobs_PK) - targets.logprobs_PK
    assert np.abs(error).max() < 1.1 / grid
    assert np.abs(error).max() > 0.1 / grid


@codecs
def test_what_the_codec_costs_is_below_its_bound(codec):
    targets = random_targets(400, 64, 5000)
    decoded = through(codec, targets, 5000)
    found = in_order_of(targets.ids_PK, decoded.ids_PK, decoded.logprobs_PK).astype(np.float64)
    difference = (np.exp(targets.logprobs_PK) * (targets.logprobs_PK - found)).sum(axis=1)
    difference += np.exp(targets.log_tail_P) * (targets.log_tail_P - decoded.log_tail_P)
    assert difference.mean() < codec.kl_bound


@codecs
def test_configuration_goes_through_json(codec):
    for settings in (codec, codec.model_copy(update={"scalar_dtype": "float32"})):
        again = topk_codec(json.loads(json.dumps(settings.model_dump())))
        assert again == settings
        assert type(again) is type(codec)


@loop(
    ("settings", "words"),
    [
        ({"name": "compcat"}, ["compcat", "did you mean 'compact'"]),
        ({"name": "zzz"}, ["zzz", "bf16, compact, exact, fp16"]),
        ({}, ["None"]),
        ({"name": "compact", "grd": 8}, ["grd", "did you mean 'grid'"]),
        ({"name": "compact", "grid": 0}, ["grid", "0"]),
        ({"name": "exact", "grid": 8}, ["grid"]),
        ({"name": "fp16", "scalar_dtype": "float8"}, ["scalar_dtype", "float8"]),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ConfigError) as caught:
        topk_codec(settings)
    for word in words:
        assert word in str(caught.value)


def test_a_rank_outside_the_table_is_damage():
    codec = topk_codec({"name": "compact"})
    targets = CASES["usual"]
    encoded = codec.encode(targets.ids_PK, targets.logprobs_PK, 100)
    with pytest.raises(CorruptCacheError, match="id_table has 3 entries"):
        codec.decode({**encoded, "id_table": encoded["id_table"][:3]}, targets.log_tail_P)
