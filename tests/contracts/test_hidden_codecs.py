from __future__ import annotations

import json

import numpy as np
import pytest

from kdcache.codecs import VECTOR_CODECS, vector_codec
from kdcache.codecs.vectors import relative_error
from kdcache.errors import ConfigError, CorruptCacheError, TeacherError
from tests.loops import loop

#: Largest relative error of a value in the normal range of codecs that store every value by itself.
ERRORS = {"bf16": 2**-8, "fp16": 2**-11, "exact": 0.0}
#: Largest relative error of a row of Gaussian states of width 64 or more, as `relative_error` measures it.
ROW_ERRORS = {"bf16": 2e-3, "fp16": 3e-4, "int8": 0.012, "exact": 0.0}
codecs = loop("codec", [vector_codec({"name": n}) for n in VECTOR_CODECS], ids=list(VECTOR_CODECS))
INT8 = vector_codec({"name": "int8"})


def states(num_positions: int = 20, width: int = 7, scale: float = 10.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (num_positions, width)).astype(np.float32)


def through(codec, values: np.ndarray) -> np.ndarray:
    return codec.decode(codec.encode(codec.stage(values)))


def row_errors(codec, values: np.ndarray) -> np.ndarray:
    return np.linalg.norm(through(codec, values) - values, axis=1) / np.linalg.norm(values, axis=1)


def with_sinks(values: np.ndarray, rows: list[int]) -> np.ndarray:
    """Make ``rows`` attention sinks: 150 times the median norm, nearly all of it in two channels."""
    values = values.copy()
    norm = float(np.median(np.linalg.norm(values, axis=1)))
    values[rows, 3], values[rows, 11] = 120 * norm, -90 * norm
    return values


def test_every_codec_is_here():
    assert list(VECTOR_CODECS) == ["bf16", "fp16", "int8", "exact"]
    assert set(ROW_ERRORS) == set(VECTOR_CODECS) == {*ERRORS, "int8"}


@codecs
@loop("num_positions", [0, 1, 20, 4099])
def test_encoded_arrays_are_the_described_ones(codec, num_positions):
    stored = codec.encode(codec.stage(states(num_positions)))
    described = {array.name: array for array in codec.arrays(7)}
    assert set(stored) == set(described)
    assert (described["states"].rows, described["states"].shape) == ("positions", (7,))
    for name, array in described.items():
        assert stored[name].dtype == array.dtype, name
        assert stored[name].shape[1:] == array.shape, name
        assert len(stored[name]) == (num_positions if array.rows == "positions" else 7), name


@codecs
def test_any_rows_decode_like_the_whole(codec):
    values = states(30, 64)
    stored = codec.encode(codec.stage(values))
    whole = codec.decode(stored)
    assert whole.dtype == np.float32
    tables = {array.name for array in codec.arrays(64) if array.rows == "table"}
    for rows in (slice(3, 5), slice(0, 1), slice(4, 4), np.array([7, 7, 0, 29])):
        part = {name: array if name in tables else array[rows] for name, array in stored.items()}
        np.testing.assert_array_equal(codec.decode(part), whole[rows])


@loop("name", ERRORS)
@loop("num_positions", [0, 1, 20])
def test_values_that_are_stored_one_by_one(name, num_positions):
    values = states(num_positions)
    found = through(vector_codec({"name": name}), values)
    np.testing.assert_allclose(found, values, rtol=ERRORS[name], atol=1e-7)


@codecs
@loop("width", [64, 576])
def test_rows_are_close(codec, width):
    values = states(600, width)
    assert relative_error(codec, values) <= ROW_ERRORS[codec.name]
    assert row_errors(codec, values).max() <= 2 * ROW_ERRORS[codec.name]


@codecs
def test_relative_error_is_that_of_the_rows(codec):
    values = states(100, 64)
    errors = row_errors(codec, values)
    assert relative_error(codec, values) == pytest.approx(np.sqrt((errors.astype(np.float64) ** 2).mean()), rel=1e-3)
    assert (relative_error(codec, values) == 0) is (codec.name == "exact")
    assert relative_error(codec, values[:0]) == 0


@codecs
def test_rows_of_zeros_stay_zeros(codec):
    values = states(6, 64)
    values[[0, 4]] = 0
    found = through(codec, values)
    assert not found[[0, 4]].any()
    assert np.isfinite(found).all()
    assert not through(codec, np.zeros((3, 64), np.float32)).any()
    assert relative_error(codec, values) <= ROW_ERRORS[codec.name]


@codecs
def test_a_channel_of_zeros_stays_zero(codec):
    values = states(50, 64)
    values[:, 5] = 0
    found = through(codec, values)
    assert not found[:, 5].any()
    assert relative_error(codec, values) <= ROW_ERRORS[codec.name]


@loop("name", ERRORS)
def test_attention_sinks_of_half_precision(name):
    codec = vector_codec({"name": name})
    values = np.array([[0.0, -0.0, 5e4, -5e4]], np.float32)
    np.testing.assert_allclose(through(codec, values), values, rtol=ERRORS[name])


def test_float16_refuses_what_it_cannot_hold():
    with pytest.raises(TeacherError, match=r"7e\+04.*60000.*bf16"):
        vector_codec({"name": "fp16"}).stage(np.array([[1.0, -7e4]], np.float32))
    for name in ("bf16", "int8", "exact"):
        found = through(vector_codec({"name": name}), np.array([[-7e4]], np.float32))
        assert found[0, 0] == pytest.approx(-7e4, rel=2**-8)


# ------------------------------------------------------------------------------------------------------- int8


def test_channels_of_very_different_scale():
    values = states(600, 64) * np.logspace(-4, 4, 64).astype(np.float32)
    # By the row, small channels do not matter; each for itself, they are as close as the large ones.
    channels = np.linalg.norm(through(INT8, values) - values, axis=0) / np.linalg.norm(values, axis=0)
    assert channels.max() <= 0.012
    assert relative_error(INT8, values) <= 0.012


@loop("sinks", [[0], [0, 200, 400]])
@loop("unequal", [False, True])
def test_attention_sinks_do_not_set_the_scale_of_other_tokens(sinks, unequal):
    values = states(600, 64)
    if unequal:
        values *= np.logspace(-1, 1, 64).astype(np.float32)
    others = np.setdiff1d(np.arange(600), sinks)
    before = row_errors(INT8, values)[others]
    changed = with_sinks(values, sinks)
    after = row_errors(INT8, changed)
    assert np.linalg.norm(changed[sinks[0]]) == pytest.approx(150 * np.median(np.linalg.norm(values, axis=1)), rel=0.01)
    assert np.sqrt((after[others] ** 2).mean()) <= 1.05 * np.sqrt((before**2).mean())
    assert after[others].max() <= 1.3 * before.max()
    assert after.max() <= 0.03  # the sinks themselves, nearly all of whose norm is in two channels
    assert relative_error(INT8, changed) <= 0.012


def test_a_scale_set_by_sinks_would_have_failed():
    """The check above can fail: plain rms of the channels, sinks included, loses the channels of all other tokens."""
    changed = with_sinks(states(600, 64), [0, 200, 400])
    rms = np.sqrt((changed.astype(np.float64) ** 2).mean(axis=0)).astype(np.float32)
    assert rms[3] > 5 * np.median(rms)
    assert INT8.encode(INT8.stage(changed))["channel_scale"][3] < 1.2 * np.median(rms) / np.sqrt(
        (states(600, 64) ** 2).mean()
    )


def test_no_value_is_clipped():
    values = with_sinks(states(600, 64), [7])
    stored = INT8.encode(INT8.stage(values))
    assert np.abs(stored["states"].astype(int)).max() == 127
    assert stored["states"].min() >= -127


def test_scales_of_another_width_are_damage():
    stored = INT8.encode(INT8.stage(states()))
    with pytest.raises(CorruptCacheError, match="channel_scale has 6 entries for 7 channels"):
        INT8.decode({**stored, "channel_scale": stored["channel_scale"][:6]})


@codecs
def test_configuration_goes_through_json(codec):
    assert vector_codec(json.loads(json.dumps(codec.model_dump()))) == codec


def test_wrong_names_are_explained():
    with pytest.raises(ConfigError, match=r"'bf61'; did you mean 'bf16'"):
        vector_codec({"name": "bf61"})
