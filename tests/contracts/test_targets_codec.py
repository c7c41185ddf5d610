"""Every codec of kept ids with every kind of targets."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs import TOPK_CODECS, TargetsCodec, topk_codec
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.schema import Targets, TargetsRecord
from tests.contracts.matching import as_counts, check_head, check_merged, check_samples, scalar_error
from tests.loops import loop
from tests.synthetic import random_targets, targets_of

RECORDS = {
    "plain": TargetsRecord(top_k=8),
    "min_prob": TargetsRecord(top_k=8, min_prob=0.02),
    "min_mass": TargetsRecord(top_k=8, min_mass=0.7),
    "one id each": TargetsRecord(top_k=8, min_prob=0.999),
    "temperatures": TargetsRecord(top_k=8, temperatures=(0.5, 2.0, 4.0)),
    "ragged with a temperature": TargetsRecord(top_k=8, min_mass=0.9, temperatures=(2.0,)),
    "sampled": TargetsRecord(kind="sampled", top_k=0, num_samples=20),
    "one draw": TargetsRecord(kind="sampled", top_k=0, num_samples=1),
    "counts above 255": TargetsRecord(kind="sampled", top_k=0, num_samples=300),
    "counts above 65,535": TargetsRecord(kind="sampled", top_k=0, num_samples=70_000),
    "hybrid": TargetsRecord(kind="hybrid", top_k=3, num_samples=10),
    "hybrid, 300 samples": TargetsRecord(kind="hybrid", top_k=2, num_samples=300),
    "hidden": TargetsRecord(kind="hidden", top_k=1),
}
#: Rows, vocabulary, spread of the logits; K = V where 12 ids are kept of 12.
CASES = {
    "usual": (40, 100, 3.0),
    "small vocabulary": (20, 12, 3.0),
    "one row": (1, 100, 3.0),
    "no rows": (0, 100, 3.0),
    "flat": (10, 100, 1e-3),
    "peaked": (20, 100, 40.0),
    "65,536 ids": (2, 65_536, 3.0),
    "262,144 ids": (2, 262_144, 3.0),
}
#: What the size of the vocabulary decides is the dtype of ids: one codec with a table of ids, one without.
LARGE = {"65,536 ids": ("compact", "exact"), "262,144 ids": ("compact", "exact")}
codecs = loop("name", TOPK_CODECS)
kinds = loop("kind", RECORDS)
cases = loop(("name", "case"), [(name, case) for case in CASES for name in LARGE.get(case, TOPK_CODECS)])
TABLES = {"id_table", "sample_table"}


@functools.cache
def made(record: TargetsRecord, case: str) -> Targets:
    num_positions, vocab_size, scale = CASES[case]
    return random_targets(num_positions, record, vocab_size, scale=scale)


def prepare(name: str, record: TargetsRecord, case: str) -> tuple[TargetsCodec, Targets]:
    return TargetsCodec(topk_codec({"name": name}), record, CASES[case][1]), made(record, case)


def check_same(codec: TargetsCodec, decoded: Targets, targets: Targets) -> None:
    error = scalar_error(codec.topk)
    check_head(codec.topk, decoded, targets)
    check_samples(decoded.samples, targets.samples)
    for part in ("log_tail_P", "gold_logprob_P", "entropy_P", "log_tails_PG"):
        found, expected = getattr(decoded, part), getattr(targets, part)
        assert (found is None) is (expected is None), part
        if found is not None:
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=error, atol=1e-7, err_msg=part)
    assert (decoded.num_kept_P is None) is (targets.num_kept_P is None)
    if targets.num_kept_P is not None:
        np.testing.assert_array_equal(decoded.num_kept_P, targets.num_kept_P)


@kinds
@cases
def test_encoded_arrays_are_the_described_ones(name, kind, case):
    codec, targets = prepare(name, RECORDS[kind], case)
    encoded = codec.encode(targets)
    described = {array.name: array for array in codec.arrays()}
    assert set(encoded) == set(described)
    num_rows = {
        "positions": targets.num_positions,
        "entries": 0 if targets.num_kept_P is None else targets.num_kept_P.sum(),
        "samples": 0 if targets.samples is None else (targets.samples.counts_PJ > 0).sum(),
    }
    for array in described.values():
        assert encoded[array.name].dtype == array.dtype, array
        assert encoded[array.name].shape[1:] == array.shape, array
        if array.rows != "table":
            assert len(encoded[array.name]) == num_rows[array.rows], array
    assert {array.name for array in described.values() if array.rows == "table"} <= TABLES


@kinds
@cases
def test_round_trip(name, kind, case):
    codec, targets = prepare(name, RECORDS[kind], case)
    decoded = codec.decode(codec.open(codec.encode(targets)))
    check_same(codec, decoded, targets)
    if targets.num_positions:
        check_merged(decoded)


@codecs
@kinds
def test_all_ids_of_the_vocabulary_kept(name, kind):
    record = RECORDS[kind].model_copy(update={"top_k": 12} if RECORDS[kind].top_k else {})
    codec, targets = prepare(name, record, "small vocabulary")
    decoded = codec.decode(codec.open(codec.encode(targets)))
    check_same(codec, decoded, targets)
    check_merged(decoded)
    if record.top_k and not record.is_ragged:
        assert np.isneginf(decoded.log_tail_P).all()
        assert targets.samples is None or not targets.samples.counts_PJ.any()


@codecs
@kinds
def test_any_rows_decode_like_the_whole(name, kind):
    codec, targets = prepare(name, RECORDS[kind], "usual")
    opened = codec.open(codec.encode(targets))
    whole = codec.decode(opened)
    for rows in (slice(0, 1), slice(7, 19), slice(39, 40), slice(5, 5), np.array([3, 3, 0, 39])):
        part = codec.decode({n: v if n in TABLES else v[rows] for n, v in opened.items()})
        expected = whole.take(rows)
        for field, values in vars(part).items():
            if field == "samples" and values is not None:
                np.testing.assert_array_equal(values.ids_PJ, expected.samples.ids_PJ)
                np.testing.assert_array_equal(values.counts_PJ, expected.samples.counts_PJ)
            elif values is None:
                assert getattr(expected, field) is None
            else:
                np.testing.assert_array_equal(values, getattr(expected, field), err_msg=field)


@codecs
@kinds
def test_decoding_leaves_the_encoded_arrays_alone(name, kind):
    codec, targets = prepare(name, RECORDS[kind], "usual")
    encoded = codec.encode(targets)
    before = {array: values.copy() for array, values in encoded.items()}
    opened = codec.open(encoded)
    first = codec.decode(opened)
    first.logprobs_PK[:] = 0
    check_same(codec, codec.decode(opened), targets)
    for array, values in before.items():
        np.testing.assert_array_equal(encoded[array], values, err_msg=array)


@codecs
def test_ragged_rows_keep_what_they_kept_and_repeat_the_first_id_behind_it(name):
    codec, targets = prepare(name, RECORDS["min_prob"], "usual")
    decoded = codec.decode(codec.open(codec.encode(targets)))
    assert len(set(targets.num_kept_P.tolist())) > 3
    padding = np.arange(8) >= targets.num_kept_P[:, None]
    np.testing.assert_array_equal(np.isneginf(decoded.logprobs_PK), padding)
    assert (decoded.ids_PK == decoded.ids_PK[:, :1])[padding].all()


@codecs
def test_rows_without_a_tail_have_no_draws(name):
    logits = np.random.default_rng(0).normal(size=(6, 30))
    logits[[0, 3], 3:] = -np.inf
    record = TargetsRecord(kind="hybrid", top_k=3, num_samples=10)
    codec, targets = TargetsCodec(topk_codec({"name": name}), record, 30), targets_of(logits, np.zeros(6, int), record)
    decoded = codec.decode(codec.open(codec.encode(targets)))
    assert [sum(row.values()) for row in as_counts(decoded.samples)] == [0, 10, 10, 0, 10, 10]
    check_same(codec, decoded, targets)
    check_merged(decoded)
    alone = codec.decode({n: v if n in TABLES else v[:1] for n, v in codec.open(codec.encode(targets)).items()})
    check_merged(alone)


@loop("kind", ["sampled", "hybrid"])
def test_draws_share_the_tail_by_their_counts(kind):
    codec, targets = prepare("exact", RECORDS[kind], "usual")
    decoded = codec.decode(codec.open(codec.encode(targets)))
    ids, logprobs, log_tail = decoded.merged()
    assert np.isneginf(log_tail).all()
    top_k, num_samples = RECORDS[kind].top_k, RECORDS[kind].num_samples
    np.testing.assert_array_equal(logprobs[:, :top_k], targets.logprobs_PK)
    for row, counts in enumerate(as_counts(targets.samples)):
        drawn = zip(ids[row, top_k:].tolist(), logprobs[row, top_k:].tolist(), strict=True)
        places = {token_id: logprob for token_id, logprob in drawn if logprob > -np.inf}
        assert set(places) == set(counts)
        for token_id, count in counts.items():
            expected = np.exp(targets.log_tail_P[row]) * count / num_samples
            assert np.exp(places[token_id]) == pytest.approx(expected, rel=1e-5)


def test_the_favourite_of_a_sampled_row_is_drawn_most_often():
    codec, targets = prepare("compact", RECORDS["counts above 255"], "usual")
    decoded = codec.decode(codec.open(codec.encode(targets)))
    for favourite, counts in zip(decoded.top1_ids_P.tolist(), as_counts(targets.samples), strict=True):
        assert counts[favourite] == max(counts.values())


# --------------------------------------------------------------------------------------------------- mistakes


@loop(
    ("kind", "part", "words"),
    [
        ("min_prob", "num_kept_P", "num_kept"),
        ("temperatures", "log_tails_PG", "log_tails"),
        ("sampled", "samples", "samples"),
    ],
)
def test_targets_without_what_the_plan_stores(kind, part, words):
    codec, targets = prepare("compact", RECORDS[kind], "usual")
    with pytest.raises(CacheError, match=f"the plan stores {words}, but the targets have none"):
        codec.encode(replace(targets, **{part: None}))


def one_row_more(values):
    values[3] += 1


def a_row_too_long(values):
    values[:] = 0
    values[0] = 255


DAMAGE = {
    ("min_prob", "num_kept", one_row_more): r"topk_\w+ has \d+ entries for rows of",
    ("min_prob", "num_kept", a_row_too_long): "the longest 255, at most 8",
    ("sampled", "num_sampled", one_row_more): r"sample_counts has \d+ entries for rows of",
    ("sampled", "num_sampled", a_row_too_long): "the longest 255, at most 20",
}


@loop(("kind", "array", "change"), DAMAGE, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_numbers_of_entries_that_contradict_each_other(kind, array, change):
    codec, targets = prepare("compact", RECORDS[kind], "usual")
    encoded = codec.encode(targets)
    change(encoded[array])
    with pytest.raises(CorruptCacheError, match=DAMAGE[kind, array, change]):
        codec.open(encoded)


@loop(("kind", "table"), [("min_prob", "id_table"), ("sampled", "sample_table")])
@loop("length", [0, 2])
def test_a_rank_outside_its_table(kind, table, length):
    codec, targets = prepare("compact", RECORDS[kind], "usual")
    opened = codec.open(codec.encode(targets))
    opened[table] = opened[table][:length]
    with pytest.raises(CorruptCacheError, match=rf"a rank is \d+, but {table} has {length} entries"):
        codec.decode(opened)


def test_no_row_can_have_more_draws_than_there_are_ids():
    record = TargetsRecord(kind="sampled", top_k=0, num_samples=10**6)
    codec = TargetsCodec(topk_codec({"name": "compact"}), record, 50)
    encoded = codec.encode(random_targets(3, record.model_copy(update={"num_samples": 5}), 50))
    encoded["num_sampled"] = np.array([10**6, 0, 0], np.uint32)
    encoded["sample_counts"] = np.ones(10**6, np.uint32)
    encoded["sample_ranks"] = np.zeros(10**6, np.uint16)
    with pytest.raises(CorruptCacheError, match="the longest 1000000, at most 50"):
        codec.open(encoded)


@given(
    st.integers(0, 30),
    st.integers(1, 9),
    st.floats(0.0, 0.9),
    st.floats(0.1, 1.0),
    st.integers(0, 2**20),
    st.floats(0, 9),
)
def test_any_ragged_targets(num_positions, top_k, min_prob, min_mass, seed, scale):
    record = TargetsRecord(top_k=top_k, min_prob=min_prob, min_mass=min_mass)
    targets = random_targets(num_positions, record, 20, seed=seed, scale=scale)
    for name in TOPK_CODECS:
        codec = TargetsCodec(topk_codec({"name": name}), record, 20)
        check_same(codec, codec.decode(codec.open(codec.encode(targets))), targets)


@given(st.integers(1, 30), st.integers(0, 4), st.integers(1, 400), st.integers(0, 2**20), st.floats(0, 9))
def test_any_draws(num_positions, top_k, num_samples, seed, scale):
    record = TargetsRecord(kind="hybrid" if top_k else "sampled", top_k=top_k, num_samples=num_samples)
    targets = random_targets(num_positions, record, 12, seed=seed, scale=scale)
    codec = TargetsCodec(topk_codec({"name": "compact"}), record, 12)
    decoded = codec.decode(codec.open(codec.encode(targets)))
    check_same(codec, decoded, targets)
    check_merged(decoded)
