"""Fields of every kind through the real writer and reader: vectors of any shape and axis, scalars that are missing."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import numpy as np
import pytest

from kdcache.cache import ShardBuilder, open_cache
from kdcache.cache.arrow import to_arrow
from kdcache.codecs import VECTOR_CODECS, targets_codec, vector_codec
from kdcache.errors import CacheError, ConfigError
from kdcache.fields import FIELD_KINDS, field_of, known_fields, vectors_field
from kdcache.schema import Sequence, TargetsRecord
from kdcache.tasks import TASKS
from kdcache.verify.stored import verify_cache
from tests.synthetic import SyntheticCache, random_targets

ORDER = [12, 3, 3, 0, 7, 5]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (300,)])
def test_vectors_of_every_token_in_any_order(tmp_path, shape):
    source = SyntheticCache(token_vectors=shape)
    source.write(tmp_path)
    cache = open_cache(str(tmp_path))
    batch = cache.read(ORDER, fields=["attention"])
    expected = np.concatenate([source.token_vectors[n] for n in ORDER])
    np.testing.assert_array_equal(batch.fields["attention"], expected)
    assert len(expected) == batch.token_offsets_N1[-1] != batch.num_positions
    assert verify_cache(str(tmp_path), deep=True).problems == []
    rows = to_arrow(cache, ORDER, fields=["attention"])["attention"].to_pylist()
    assert [len(row) for row in rows] == [len(source.tokens[n]) for n in ORDER]
    np.testing.assert_array_equal(np.array(rows[0], np.float32), source.token_vectors[12])
    collated = TASKS["causal-lm"].collate(batch, 0)
    np.testing.assert_array_equal(collated["attention"], expected)


@pytest.mark.parametrize("codec", VECTOR_CODECS)
def test_codecs_see_all_further_axes_as_one(codec):
    record = vectors_field("maps", vector_codec({"name": codec}), (2, 3))
    field = field_of(record, SyntheticCache().plan())
    values = np.random.default_rng(0).normal(size=(40, 2, 3)).astype(np.float32)
    encoded = field.encode(field.stage(values))
    assert {array.name: array.shape for array in record.arrays} == {
        name: array.shape[1:] if name != "channel_scale" else () for name, array in encoded.items()
    }
    flat = vector_codec({"name": codec})
    expected = flat.decode(flat.encode(flat.stage(values.reshape(40, 6)))).reshape(40, 2, 3)
    np.testing.assert_array_equal(field.decode(field.open(encoded)), expected)


@pytest.mark.parametrize("codec", ["compact", "fp16", "exact"])
@pytest.mark.parametrize("missing", ["gold_logprob", "entropy"])
def test_a_scalar_that_is_not_stored_is_none_everywhere(tmp_path, codec, missing):
    scalars = tuple(name for name in ("log_tail", "gold_logprob", "entropy") if name != missing)
    SyntheticCache(codec=codec, record=TargetsRecord(top_k=4, scalars=scalars)).write(tmp_path)
    cache = open_cache(str(tmp_path))
    batch = cache.read(ORDER)
    assert getattr(batch.targets, f"{missing}_P") is None
    assert f"teacher_{missing}" not in TASKS["causal-lm"].collate(batch, 0)
    assert missing not in to_arrow(cache, ORDER).column_names
    column = {"gold_logprob": "teacher_loss", "entropy": "teacher_entropy"}[missing]
    assert column not in cache.sequence_table().column_names
    assert verify_cache(str(tmp_path), deep=True).problems == []


@pytest.mark.parametrize("codec", ["fp16", "bf16", "exact"])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_tail_that_is_not_stored_is_one_minus_the_kept_mass(tmp_path, codec, ragged):
    record = TargetsRecord(top_k=6, scalars=(), tail="remainder", min_prob=0.01 if ragged else 0.0)
    SyntheticCache(codec=codec, record=record).write(tmp_path)
    targets = open_cache(str(tmp_path)).read(ORDER).targets
    kept_P = np.exp(targets.logprobs_PK.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(np.exp(targets.log_tail_P), 1 - kept_P, atol=2e-6)
    assert verify_cache(str(tmp_path), deep=True).problems == []


@pytest.mark.parametrize("codec", ["compact", "fp16", "exact"])
def test_probabilities_over_the_kept_ids_have_no_tail(tmp_path, codec):
    SyntheticCache(codec=codec, record=TargetsRecord(top_k=5, probabilities="kept")).write(tmp_path)
    targets = open_cache(str(tmp_path)).read(ORDER).targets
    assert np.isneginf(targets.log_tail_P).all()
    np.testing.assert_allclose(np.exp(targets.logprobs_PK).sum(axis=1), 1, atol=1e-5)
    assert verify_cache(str(tmp_path), deep=True).problems == []


@pytest.mark.parametrize(
    ("codec", "record", "words"),
    [
        ("exact", TargetsRecord(top_k=4, scalars=()), "stores no log_tail; add it to targets.scalars"),
        ("compact", TargetsRecord(top_k=4, scalars=(), tail="remainder"), "codec compact needs the scalar log_tail"),
    ],
)
def test_a_tail_that_nobody_could_know_is_rejected(codec, record, words):
    with pytest.raises(ConfigError, match=words):
        targets_codec({"name": codec}, record, 50)


def test_a_field_whose_kind_is_missing_or_broken_spoils_no_other(tmp_path, monkeypatch):
    source = SyntheticCache(token_vectors=(2,))
    entry = EntryPoint("broken", "kdcache_no_such_module:Kind", FIELD_KINDS.group)
    monkeypatch.setitem(FIELD_KINDS._plugins, "broken", [entry])
    for kind in ("unheard-of", "broken"):
        record = source.fields()[-1].model_copy(update={"kind": kind})
        plan = source.plan(fields=(*source.fields()[:-1], record))
        assert list(known_fields(plan)) == ["tokens", "targets"]
        with pytest.raises(ConfigError, match=kind):
            field_of(record, plan)


def test_a_shard_is_the_same_in_whatever_order_it_is_filled():
    source = SyntheticCache(5, hidden=("hidden-1",), token_vectors=(3,))
    fields = known_fields(source.plan())
    members = [Sequence(n, source.tokens[n], source.masks[n]) for n in range(5)]

    def rows_of(numbers):
        return {
            "targets": type(source.targets[0]).concatenate([source.targets[n] for n in numbers]),
            "hidden-1": np.concatenate([source.states[n]["hidden-1"] for n in numbers]),
            "attention": np.concatenate([source.token_vectors[n] for n in numbers]),
        }

    built = []
    for batches in ([range(5)], [[0, 1], [2, 3, 4]], [[3], [4, 0], [2, 1]]):
        builder = ShardBuilder(0, fields)
        for numbers in batches:
            builder.put(list(numbers), [members[n] for n in numbers], rows_of(numbers))
        built.append(builder.build(source.table(), TASKS["causal-lm"].stored_labels))
    whole = built[0]
    for other in built[1:]:
        np.testing.assert_array_equal(other.tokens.tokens_T, whole.tokens.tokens_T)
        np.testing.assert_array_equal(other.values["targets"].logprobs_PK, whole.values["targets"].logprobs_PK)
        for name in ("hidden-1", "attention"):
            np.testing.assert_array_equal(other.values[name], whole.values[name])


def test_a_shard_without_all_of_its_sequences_is_not_built():
    source = SyntheticCache(5)
    builder = ShardBuilder(3, known_fields(source.plan()))
    builder.put([0], [Sequence(0, source.tokens[0], source.masks[0])], {"targets": source.targets[0]})
    with pytest.raises(CacheError, match="shard 3 has 1 of its 5 sequences"):
        builder.build(source.table(), TASKS["causal-lm"].stored_labels)


def test_random_targets_without_scalars_encode():
    record = TargetsRecord(top_k=4, scalars=("log_tail",))
    targets = random_targets(9, record, 50)
    assert targets.entropy_P is None
    codec = targets_codec({"name": "exact"}, record, 50)
    assert "entropy" not in codec.encode(targets)
    with pytest.raises(CacheError, match="the plan stores gold_logprob"):
        targets_codec({"name": "exact"}, TargetsRecord(top_k=4), 50).encode(targets)
