"""The published layouts have the sizes that are published, give back what they store, and lose what they lose."""

import numpy as np
import pytest
import torch

from benchmarks.peers import PEERS, Encoded, PeerRows, PolynomialPeer, TeacherSample, TopLogprobs
from kdcache.errors import ConfigError

NUM_POSITIONS, VOCAB_SIZE, NUM_SAMPLES = 300, 49_152, 50
FITTED = {"distillkit": 16, "distillkit-normalised": 16, "distillkit-budget": 1}


def make_sample(num_positions: int = NUM_POSITIONS, vocab_size: int = VOCAB_SIZE) -> TeacherSample:
    """Rows that fall with the rank as a language model's do: Zipf-like, each of another steepness, a little rough."""
    generator = np.random.default_rng(0)
    steepness = generator.uniform(0.9, 2.0, (num_positions, 1))
    rough = generator.normal(0, 0.05, (num_positions, 128))
    logits = -np.sort(steepness * np.log(np.arange(2, 130)) + rough, axis=1)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) + np.log(0.92)
    # Distinct ids of the whole range: an arithmetic progression modulo V from a start of each row's own.
    starts = generator.integers(0, vocab_size, (num_positions, 1))
    ids = ((starts + 12_345 * np.arange(128)) % vocab_size).astype(np.int32)
    samples = ids[np.arange(num_positions)[:, None], generator.geometric(0.1, (num_positions, NUM_SAMPLES)) % 128]
    return TeacherSample(vocab_size, TopLogprobs(ids, logprobs.astype(np.float32)), samples)


SAMPLE = make_sample()


def kl_of(rows: PeerRows, sample: TeacherSample) -> float:
    """Return the mean KL in nats of the stored ids' distribution, both sides renormalised over them."""
    assert sample.top is not None
    target = np.exp(sample.top.logprobs_PK[:, : rows.ids_PJ.shape[1]].astype(np.float64))
    target /= target.sum(axis=1, keepdims=True)
    decoded = rows.probs_PJ.astype(np.float64)
    decoded /= decoded.sum(axis=1, keepdims=True)
    return float((target * (np.log(target) - np.log(decoded))).sum(axis=1).mean())


def dense(rows: PeerRows, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    probs_PV = np.zeros((len(rows.ids_PJ), vocab_size), np.float32)
    np.add.at(probs_PV, (np.arange(len(rows.ids_PJ))[:, None], rows.ids_PJ), rows.probs_PJ)
    return probs_PV


def assert_draws_are_kept(encoded: Encoded) -> None:
    assert SAMPLE.samples_PN is not None
    expected = np.zeros((NUM_POSITIONS, VOCAB_SIZE), np.float32)
    np.add.at(expected, (np.arange(NUM_POSITIONS)[:, None], SAMPLE.samples_PN), 1)
    np.testing.assert_array_equal(dense(encoded.decode()), expected / np.float32(NUM_SAMPLES))


@pytest.mark.parametrize("name", PEERS)
def test_decoding_gives_rows_without_a_tail(name: str) -> None:
    encoded = PEERS[name].encode(SAMPLE)
    rows = encoded.decode()
    assert encoded.num_bytes == sum(map(len, encoded.payload)) > 0
    assert all(isinstance(part, bytes) for part in encoded.payload)
    assert (rows.ids_PJ.dtype, rows.probs_PJ.dtype) == (np.int32, np.float32)
    assert rows.ids_PJ.shape == rows.probs_PJ.shape
    assert not rows.has_tail
    assert np.isfinite(rows.probs_PJ).all()
    assert (rows.probs_PJ >= 0).all()


@pytest.mark.parametrize("name", [name for name in PEERS if not name.startswith("sampling")])
@pytest.mark.parametrize("vocab_size", [49_152, 65_536, 65_537, 131_072])
def test_ids_come_back_exactly(name: str, vocab_size: int) -> None:
    sample = make_sample(50, vocab_size)
    ids_PJ = PEERS[name].encode(sample).decode().ids_PJ
    assert sample.top is not None
    np.testing.assert_array_equal(ids_PJ, sample.top.ids_PK[:, : ids_PJ.shape[1]])


@pytest.mark.parametrize(
    ("name", "vocab_size", "num_bytes"),
    [
        # exact values of 2 bytes + coefficients of 4 + ids of ceil(log2 V) bits
        ("distillkit", 49_152, 16 * 2 + 6 * 4 + 128 * 16 // 8),
        ("distillkit-normalised", 49_152, 312),
        ("distillkit", 151_936, 16 * 2 + 6 * 4 + 128 * 18 // 8),
        ("distillkit-budget", 49_152, 1 * 2 + 3 * 4 + 50 * 16 // 8),
        ("distillkit-budget", 128_256, 14 + 107),
    ],
)
def test_distillkit_has_its_published_size(name: str, vocab_size: int, num_bytes: int) -> None:
    assert PEERS[name].encode(make_sample(50, vocab_size)).num_bytes == 50 * num_bytes


@pytest.mark.parametrize("name", FITTED)
def test_distillkit_keeps_the_first_values_in_bfloat16(name: str) -> None:
    assert SAMPLE.top is not None
    kept = FITTED[name]
    expected = torch.from_numpy(SAMPLE.top.logprobs_PK[:, :kept]).bfloat16().float().exp().numpy()
    np.testing.assert_allclose(PEERS[name].encode(SAMPLE).decode().probs_PJ[:, :kept], expected, rtol=1e-6)


def test_distillkit_fits_a_curve_of_its_own_terms() -> None:
    ranks = np.arange(49)
    logprobs = np.concatenate([[-0.5], -2 - 0.05 * ranks - 0.3 * np.sqrt(ranks)]).astype(np.float32)
    top = TopLogprobs(np.arange(50, dtype=np.int32)[None], logprobs[None])
    rows = PEERS["distillkit-budget"].encode(TeacherSample(VOCAB_SIZE, top)).decode()
    np.testing.assert_allclose(np.log(rows.probs_PJ[0, 1:]), logprobs[1:], atol=1e-4)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="only MKL's float32 SVD loses the small values")
def test_recommended_fit_breaks_in_float32() -> None:
    recommended, normalised = PEERS["distillkit"], PEERS["distillkit-normalised"]
    assert isinstance(recommended, PolynomialPeer)
    in_float64 = recommended.model_copy(update={"fit_dtype": "float64"})
    broken, good, repaired = (kl_of(p.encode(SAMPLE).decode(), SAMPLE) for p in (recommended, normalised, in_float64))
    assert good < 1e-3
    assert repaired == pytest.approx(good, rel=1e-2)
    assert broken > 20 * good


def test_megatron_stores_float16_in_262_bytes_before_zstd() -> None:
    assert SAMPLE.top is not None
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 131_072, (2000, 64)).astype(np.int32)
    logprobs = -np.sort(generator.uniform(0, 20, (2000, 64)).astype(np.float32), axis=1)
    encoded = PEERS["megatron"].encode(TeacherSample(131_072, TopLogprobs(ids, logprobs)))
    # Random ids do not compress: 16 bits and the 17th; random sorted values only a little.
    assert 64 * 17 / 8 * 2000 < encoded.num_bytes < (64 * 2 + 64 * 17 / 8) * 2000
    rows = encoded.decode()
    np.testing.assert_array_equal(rows.ids_PJ, ids)
    np.testing.assert_array_equal(rows.probs_PJ, np.exp(logprobs.astype(np.float16).astype(np.float32)))
    assert kl_of(PEERS["megatron"].encode(SAMPLE).decode(), SAMPLE) < 1e-5


@pytest.mark.parametrize("name", ["sampling", "sampling-zstd"])
def test_draws_come_back_exactly(name: str) -> None:
    assert_draws_are_kept(PEERS[name].encode(SAMPLE))


def test_sampling_takes_three_bytes_for_a_distinct_id() -> None:
    assert SAMPLE.samples_PN is not None
    num_distinct = sum(len(set(row)) for row in SAMPLE.samples_PN.tolist())
    encoded = PEERS["sampling"].encode(SAMPLE)
    assert encoded.num_bytes == 3 * num_distinct + NUM_POSITIONS
    assert PEERS["sampling-zstd"].encode(SAMPLE).num_bytes < encoded.num_bytes


def test_sampling_holds_the_extremes() -> None:
    samples = np.stack([np.full(127, 131_071), np.arange(127)])
    rows = PEERS["sampling"].encode(TeacherSample(131_072, samples_PN=samples)).decode()
    assert rows.ids_PJ.shape == (2, 127)
    assert rows.ids_PJ[0, 0] == 131_071
    np.testing.assert_array_equal(rows.probs_PJ[0], [1, *[0] * 126])
    np.testing.assert_array_equal(rows.ids_PJ[1], np.arange(127))


def test_many_positions_are_packed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PEERS["distillkit"].encode(SAMPLE)
    monkeypatch.setattr("benchmarks.peers.BLOCK_ROWS", 7)
    assert PEERS["distillkit"].encode(SAMPLE).payload == whole.payload
    np.testing.assert_array_equal(whole.decode().ids_PJ, PEERS["distillkit"].encode(SAMPLE).decode().ids_PJ)


@pytest.mark.parametrize("name", PEERS)
def test_what_a_layout_needs_must_be_there(name: str) -> None:
    with pytest.raises(ConfigError, match="found"):
        PEERS[name].encode(TeacherSample(VOCAB_SIZE))


@pytest.mark.parametrize("name", ["megatron", "sampling", "sampling-zstd"])
def test_seventeen_bits_are_too_few_for_large_vocabularies(name: str) -> None:
    with pytest.raises(ConfigError, match=r"131,072.*151,936"):
        PEERS[name].encode(make_sample(3, 151_936))


def test_bad_samples_are_refused() -> None:
    ids, falling = np.array([[3, 1]], np.int32), np.array([[-1.0, -2.0]], np.float32)
    with pytest.raises(ConfigError, match="128 most probable ids, found 2"):
        PEERS["distillkit"].encode(TeacherSample(VOCAB_SIZE, TopLogprobs(ids, falling)))
    with pytest.raises(ConfigError, match=r"found \(1, 2\) and \(1, 1\)"):
        TopLogprobs(ids, falling[:, :1])
    with pytest.raises(ConfigError, match="most probable first"):
        TopLogprobs(ids, falling[:, ::-1])
    with pytest.raises(ConfigError, match="finite"):
        TopLogprobs(ids, np.array([[-1.0, -np.inf]], np.float32))
    with pytest.raises(ConfigError, match=r"\[0, 3\), found 1 to 3"):
        TeacherSample(3, TopLogprobs(ids, falling))
    with pytest.raises(ConfigError, match=r"at least one position.*found shape \(0, 50\)"):
        TeacherSample(VOCAB_SIZE, samples_PN=np.zeros((0, 50), np.int32))
    with pytest.raises(ConfigError, match="7 bits"):
        PEERS["sampling"].encode(TeacherSample(VOCAB_SIZE, samples_PN=np.zeros((2, 128), np.int32)))
