from __future__ import annotations

import json

import numpy as np
import pytest

from kdcache.codecs import HIDDEN_CODECS, hidden_codec
from kdcache.errors import ConfigError, TeacherError

#: Largest relative error of a value in each codec's normal range.
ERRORS = {"bf16": 2**-8, "fp16": 2**-11, "exact": 0.0}
codecs = pytest.mark.parametrize("codec", [hidden_codec({"name": n}) for n in HIDDEN_CODECS], ids=list(HIDDEN_CODECS))


def states(num_positions: int = 20, width: int = 7, scale: float = 10.0) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, (num_positions, width)).astype(np.float32)


def test_every_codec_is_here():
    assert set(HIDDEN_CODECS) == set(ERRORS)


@codecs
@pytest.mark.parametrize("num_positions", [0, 1, 20])
def test_round_trip(codec, num_positions):
    values = states(num_positions)
    [array] = codec.arrays(7)
    stored = codec.encode(values)
    assert (array.name, array.rows, array.shape) == ("states", "positions", (7,))
    assert stored.dtype == array.dtype
    assert stored.shape == values.shape
    decoded = codec.decode(stored)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, values, rtol=ERRORS[codec.name], atol=1e-7)
    np.testing.assert_array_equal(codec.decode(stored[3:5]), decoded[3:5])


@codecs
def test_zero_and_attention_sinks(codec):
    values = np.array([[0.0, -0.0, 5e4, -5e4]], np.float32)
    np.testing.assert_allclose(codec.decode(codec.encode(values)), values, rtol=ERRORS[codec.name])


def test_float16_refuses_what_it_cannot_hold():
    with pytest.raises(TeacherError, match=r"7e\+04.*60000.*bf16"):
        hidden_codec({"name": "fp16"}).encode(np.array([[1.0, -7e4]], np.float32))
    for name in ("bf16", "exact"):
        codec = hidden_codec({"name": name})
        assert codec.decode(codec.encode(np.array([[-7e4]], np.float32)))[0, 0] == pytest.approx(-7e4, rel=2**-8)


@codecs
def test_configuration_goes_through_json(codec):
    assert hidden_codec(json.loads(json.dumps(codec.model_dump()))) == codec


def test_wrong_names_are_explained():
    with pytest.raises(ConfigError, match=r"'bf61', did you mean 'bf16'"):
        hidden_codec({"name": "bf61"})
