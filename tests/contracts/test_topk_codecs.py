from __future__ import annotations

import json

import numpy as np
import pytest

from kdcache.codecs import TOPK_CODECS, topk_codec
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.schema import Targets
from tests.synthetic import random_targets, targets_of

#: What each codec states: the largest error of a kept log-probability before re-normalisation, in nats, absolute and
#: relative to its size.
ERRORS = {"compact": (0.5 / 16, 0.0), "fp16": (0.0, 2**-11), "bf16": (0.0, 2**-8), "exact": (0.0, 0.0)}
CASES = {
    "usual": random_targets(40, 8, 100),
    "k=1": random_targets(10, 1, 100),
    "k=V": random_targets(10, 12, 12),
    "V=1": random_targets(3, 1, 1),
    "one row": random_targets(1, 8, 100),
    "no rows": random_targets(0, 8, 100),
    "flat": random_targets(10, 8, 100, scale=1e-3),
    "peaked": random_targets(10, 8, 100, scale=40.0),
    "70,000 ids": random_targets(3, 8, 70_000),
    "262,144 ids": random_targets(2, 8, 262_144),
    "65,536 ids": random_targets(2, 8, 65_536),
}
VOCAB_SIZES = {
    "k=V": 12,
    "V=1": 1,
    "70,000 ids": 70_000,
    "262,144 ids": 262_144,
    "65,536 ids": 65_536,
}
codecs = pytest.mark.parametrize("codec", [topk_codec({"name": name}) for name in TOPK_CODECS], ids=list(TOPK_CODECS))
cases = pytest.mark.parametrize("case", CASES)


def mass(targets: Targets) -> np.ndarray:
    return np.exp(targets.logprobs_PK.astype(np.float64)).sum(1) + np.exp(targets.log_tail_P.astype(np.float64))


def test_every_codec_is_here():
    assert list(TOPK_CODECS) == ["compact", "bf16", "fp16", "exact"]
    assert set(ERRORS) == set(TOPK_CODECS)


@codecs
@cases
def test_encoded_arrays_are_the_described_ones(codec, case):
    targets, vocab_size = CASES[case], VOCAB_SIZES.get(case, 100)
    encoded = codec.encode(targets, vocab_size)
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
    decoded = codec.decode(codec.encode(targets, vocab_size))
    np.testing.assert_array_equal(decoded.ids_PK, targets.ids_PK)
    assert decoded.ids_PK.dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)
    for name, values in vars(decoded).items():
        assert name == "ids_PK" or values.dtype == np.float32
    np.testing.assert_allclose(mass(decoded), 1, atol=1e-5)
    assert (np.diff(decoded.logprobs_PK, axis=1) <= 0).all()
    scalar_error = 0 if codec.scalar_dtype == "float32" else 2**-11
    for name in ("log_tail_P", "gold_logprob_P", "entropy_P"):
        np.testing.assert_allclose(getattr(decoded, name), getattr(targets, name), rtol=scalar_error, atol=1e-7)
    # Scaling the head to 1 - tail shifts all of a row by at most the largest error of a kept value and of the tail;
    # a step above the longest of the compact code is cut, which only ever raises what follows it.
    steps = -np.diff(targets.logprobs_PK, axis=1, prepend=targets.logprobs_PK[:, :1])
    representable = np.cumsum(steps > 255 / 16, axis=1) == 0
    representable |= codec.name != "compact"
    absolute, relative = ERRORS[codec.name]
    one = absolute + relative * np.abs(targets.logprobs_PK)
    weighted = (np.exp(targets.logprobs_PK) * one).sum(1) / np.maximum(np.exp(targets.logprobs_PK).sum(1), 1e-30)
    with np.errstate(invalid="ignore"):
        tail = scalar_error * np.nan_to_num(np.abs(targets.log_tail_P) * np.exp(targets.log_tail_P))
    head = np.exp(targets.logprobs_PK.astype(np.float64)).sum(1)
    slack = 1.1 * (one + weighted[:, None] + (tail / head)[:, None]) + (1e-5 if codec.name != "exact" else 0)
    error = np.abs(decoded.logprobs_PK - targets.logprobs_PK)
    assert (error <= slack)[representable].all(), error[representable].max()


@codecs
def test_any_slice_of_rows_decodes_like_the_whole(codec):
    targets = CASES["usual"]
    encoded = codec.encode(targets, 100)
    whole = codec.decode(encoded)
    tables = {array.name for array in codec.arrays(targets.top_k, 100) if array.rows == "table"}
    for rows in (slice(0, 1), slice(7, 19), slice(39, 40), slice(5, 5), np.array([3, 3, 0, 39])):
        part = codec.decode({n: v if n in tables else v[rows] for n, v in encoded.items()})
        for name, values in vars(part).items():
            np.testing.assert_array_equal(values, getattr(whole, name)[rows], err_msg=name)


@codecs
def test_decoding_leaves_the_encoded_arrays_alone(codec):
    encoded = codec.encode(CASES["usual"], 100)
    before = {name: values.copy() for name, values in encoded.items()}
    codec.decode(encoded).logprobs_PK[:] = 0
    for name, values in before.items():
        np.testing.assert_array_equal(encoded[name], values, err_msg=name)


@codecs
@pytest.mark.parametrize("gap", [15.9, 16.0, 40.0, 500.0, 1e4])
def test_huge_gaps(codec, gap):
    logits = np.zeros((1, 6))
    logits[0, 2:] = -gap
    targets = targets_of(logits, np.array([5]), 4)
    decoded = codec.decode(codec.encode(targets, 6))
    np.testing.assert_array_equal(decoded.ids_PK, targets.ids_PK)
    assert np.isfinite(decoded.logprobs_PK).all()
    np.testing.assert_allclose(np.exp(decoded.logprobs_PK), np.exp(targets.logprobs_PK), atol=2e-3)
    np.testing.assert_allclose(mass(decoded), 1, atol=1e-5)


@codecs
@pytest.mark.parametrize("tail", [0.0, 1e-30, 1e-6, 0.5, 1 - 1e-4, 1 - 1e-7])
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
    decoded = codec.decode(codec.encode(targets, 10))
    np.testing.assert_allclose(mass(decoded), 1, atol=1e-5)
    assert not np.isnan(decoded.logprobs_PK).any()
    np.testing.assert_allclose(np.exp(decoded.log_tail_P), [tail], rtol=2e-2, atol=1e-7)
    ratio = decoded.logprobs_PK[0, 0] - decoded.logprobs_PK[0, 1]
    assert abs(ratio - np.log(3)) < (0.07 if tail > 0.9 else 0.04)


@codecs
def test_an_id_that_the_teacher_rules_out(codec):
    targets = targets_of(np.array([[0.0, -np.inf, 1.0, -np.inf]]), np.array([2]), 4)
    targets.logprobs_PK = np.maximum(targets.logprobs_PK, np.float32(-1e4))
    decoded = codec.decode(codec.encode(targets, 4))
    np.testing.assert_allclose(np.exp(decoded.logprobs_PK), np.exp(targets.logprobs_PK), atol=5e-3)


def test_exact_is_exact_to_the_bit():
    codec = topk_codec({"name": "exact"})
    for case, targets in CASES.items():
        decoded = codec.decode(codec.encode(targets, VOCAB_SIZES.get(case, 100)))
        for name in ("logprobs_PK", "log_tail_P", "gold_logprob_P", "entropy_P"):
            assert getattr(decoded, name).tobytes() == getattr(targets, name).tobytes(), (case, name)


def test_errors_of_the_compact_codec_do_not_add_up_along_k():
    targets = random_targets(200, 500, 1000)
    codec = topk_codec({"name": "compact"})
    error = codec.decode(codec.encode(targets, 1000)).logprobs_PK - targets.logprobs_PK
    assert np.abs(error).max() < 2 * 0.5 / 16


@pytest.mark.parametrize("grid", [1, 8, 32, 64])
def test_a_finer_grid_is_closer(grid):
    targets = CASES["flat"]
    codec = topk_codec({"name": "compact", "grid": grid})
    error = codec.decode(codec.encode(targets, 100)).logprobs_PK - targets.logprobs_PK
    assert np.abs(error).max() < 1.1 / grid


@codecs
def test_configuration_goes_through_json(codec):
    for settings in (codec, codec.model_copy(update={"scalar_dtype": "float32"})):
        again = topk_codec(json.loads(json.dumps(settings.model_dump())))
        assert again == settings
        assert type(again) is type(codec)


@pytest.mark.parametrize(
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
    encoded = codec.encode(CASES["usual"], 100)
    with pytest.raises(CorruptCacheError, match="id_table has 3 entries"):
        codec.decode({**encoded, "id_table": encoded["id_table"][:3]})
