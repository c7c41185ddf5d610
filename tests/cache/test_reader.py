from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import open_cache
from kdcache.cache.shard_file import pack
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.inspect import inspect_cache
from kdcache.schema import TargetsRecord
from tests.cache.test_stranger import change_manifest, set_at
from tests.caches import SOURCE
from tests.contracts.matching import check_samples, in_order_of
from tests.synthetic import SyntheticCache


def check_targets(found, expected):
    """The same to the bit, but for the order of samples."""
    check_samples(found.samples, expected.samples)
    for name, values in vars(expected).items():
        if name != "samples":
            assert (getattr(found, name) is None) is (values is None), name
            if values is not None:
                np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)


def check_batch(batch, source, indices, hidden=()):
    """The batch holds exactly these sequences, in this order."""
    assert batch.indices == list(indices)
    assert len(batch) == len(indices)
    pieces = np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])
    assert batch.tokens_T.dtype == np.uint32
    for number, index in enumerate(indices):
        rows = slice(batch.position_offsets_N1[number], batch.position_offsets_N1[number + 1])
        tokens = slice(batch.token_offsets_N1[number], batch.token_offsets_N1[number + 1])
        np.testing.assert_array_equal(pieces[number], source.tokens[index])
        np.testing.assert_array_equal(batch.loss_mask_P[rows], source.masks[index])
        check_targets(batch.targets.take(rows), source.targets[index])
        if source.packed:
            np.testing.assert_array_equal(batch.segment_ids_T[tokens], source.segments[index])
        for name in hidden:
            field = "hidden-2" if name == "last" else name
            np.testing.assert_array_equal(batch.hidden[name][rows], source.states[index][field])
    assert batch.position_offsets_N1[-1] == batch.targets.num_positions == len(batch.loss_mask_P)
    assert set(batch.hidden) == set(hidden)


@pytest.mark.parametrize(
    "indices",
    [[0], [12], range(13), range(12, -1, -1), [4, 5], [3, 3, 3], [9, 0, 9, 12, 1], [5, 6, 7, 8, 9], [10, 11, 12]],
    ids=str,
)
@pytest.mark.parametrize("hidden", [(), ("hidden-2",), ("hidden-2", "hidden-1")], ids=str)
def test_any_order_any_subset(sound, indices, hidden):
    check_batch(open_cache(str(sound)).read(indices, fields=hidden), SOURCE, indices, hidden)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(1, 4))
def test_random_reads(sound, indices, max_open_shards):
    cache = open_cache(str(sound), max_open_shards=max_open_shards)
    check_batch(cache.read(indices), SOURCE, indices)


def test_memory_is_bounded_by_the_open_shards(sound, monkeypatch):
    reads = []
    cache = open_cache(str(sound), max_open_shards=2)
    real = cache.folder.read
    monkeypatch.setattr(cache.folder, "read", lambda name, **bound: reads.append(name) or real(name, **bound))
    for index in (0, 4, 5, 0, 9):
        cache.read([index])
    assert len(reads) == 2 * 2  # tokens and targets
    for index in (10, 5, 0):  # shard 0 was used last before shard 1 was, so it had to go
        cache.read([index])
    assert len(reads) == 2 * 4  # tokens and targets


@pytest.mark.parametrize("codec", ["compact", "fp16", "bf16"])
def test_every_sequence_decodes_alone_as_in_company(tmp_path, codec):
    SyntheticCache(codec=codec).write(tmp_path)
    cache = open_cache(str(tmp_path))
    whole = cache.read(range(13))
    for index in range(13):
        alone = cache.read([index])
        rows = slice(whole.position_offsets_N1[index], whole.position_offsets_N1[index + 1])
        check_targets(alone.targets, whole.targets.take(rows))


@pytest.mark.parametrize("vocab_size", [70_000, 262_144])
@pytest.mark.parametrize("codec", ["compact", "exact"])
def test_ids_above_16_bits(tmp_path, vocab_size, codec):
    source = SyntheticCache(3, vocab_size=vocab_size, codec=codec, top_k=16)
    source.write(tmp_path)
    batch = open_cache(str(tmp_path)).read([2, 0, 1])
    ids = np.concatenate([source.targets[n].ids_PK for n in (2, 0, 1)])
    in_order_of(ids, batch.targets.ids_PK, batch.targets.logprobs_PK)
    np.testing.assert_array_equal(batch.tokens_T, np.concatenate([source.tokens[n] for n in (2, 0, 1)]))
    assert batch.targets.ids_PK.max() > 1 << 16


def test_without_packing_there_are_no_segments(tmp_path):
    SyntheticCache(2).write(tmp_path)
    assert open_cache(str(tmp_path)).read([0, 1]).segment_ids_T is None


def test_tables_and_lengths(sound):
    cache = open_cache(str(sound))
    table = cache.sequence_table()
    assert table["sequence"].to_pylist() == list(range(13))
    assert cache.sequence_table(columns=["document_id"]).column_names == ["document_id"]
    np.testing.assert_array_equal(cache.lengths_N, SOURCE.lengths)
    for index in (0, 5, 12):
        metadata = cache.metadata(index)
        assert metadata["document_id"] == f"document {index}"
        mask, targets = SOURCE.masks[index].astype(bool), SOURCE.targets[index]
        assert metadata["num_targets"] == mask.sum()
        if mask.any():
            assert metadata["teacher_loss"] == pytest.approx(-targets.gold_logprob_P[mask].mean(), rel=1e-5)
            assert metadata["teacher_entropy"] == pytest.approx(targets.entropy_P[mask].mean(), rel=1e-5)
            assert metadata["kept_mass"] == pytest.approx((1 - np.exp(targets.log_tail_P))[mask].mean(), rel=1e-4)


def test_description_agrees_with_what_was_written(sound):
    cache = open_cache(str(sound))
    description = inspect_cache(cache)
    masks = np.concatenate(SOURCE.masks).astype(bool)
    gold = np.concatenate([targets.gold_logprob_P for targets in SOURCE.targets])
    best = np.concatenate([targets.ids_PK[:, 0] for targets in SOURCE.targets])
    labels = np.concatenate([tokens[1:] for tokens in SOURCE.tokens])
    totals = description["totals"]
    assert totals["num_targets"] == masks.sum()
    assert totals["teacher_loss"] == pytest.approx(-gold[masks].mean(), rel=1e-6)
    assert totals["teacher_perplexity"] == pytest.approx(np.exp(-gold[masks].mean()), rel=1e-6)
    assert totals["teacher_top1_accuracy"] == pytest.approx((best == labels)[masks].mean())
    files = [path for path in sound.rglob("*") if path.suffix in (".zip", ".arrow")]
    assert totals["num_bytes"] == sum(path.stat().st_size for path in files)
    assert totals["bytes_per_token"] == pytest.approx(totals["num_bytes"] / SOURCE.lengths.sum())
    assert description["fingerprint"] == cache.fingerprint
    assert cache.manifest.top_k == 4
    assert cache.manifest.hidden_layers == ("hidden-1", "hidden-2")


@pytest.mark.parametrize("index", [-1, 13, 10**9])
def test_a_sequence_that_is_not_there(sound, index):
    with pytest.raises(CacheError, match=rf"no sequence {index}; .* has 13 \(0 to 12\)"):
        open_cache(str(sound)).read([0, index])


def test_a_field_that_is_not_there(sound):
    with pytest.raises(CacheError, match="no field 'hidden-3'; it holds tokens, targets, hidden-1, hidden-2"):
        open_cache(str(sound)).read([0], fields=["hidden-3"])


def test_reading_nothing(sound):
    with pytest.raises(CacheError, match="no sequences"):
        open_cache(str(sound)).read([])


def test_a_damaged_tokenizer_is_not_handed_out(tmp_path):
    path = tmp_path / "cache"
    SyntheticCache().write(path)
    file = path / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"1.0", b"6.6"))
    cache = open_cache(str(path))
    for call in (cache.tokenizer_json, cache.tokenizer_dir):
        with pytest.raises(CorruptCacheError, match=r"tokenizer/tokenizer.json is damaged"):
            call()


@pytest.mark.parametrize("kind", ["hidden", "top-k"])
def test_last_is_the_last_layer_in_every_cache(tmp_path, kind):
    record = TargetsRecord(kind="hidden", top_k=1) if kind == "hidden" else TargetsRecord(top_k=4)
    source = SyntheticCache(record=record, hidden=("hidden-1",) if kind == "hidden" else ("hidden-1", "hidden-2"))
    cache = open_cache(source.write(tmp_path / "cache"))
    batch = cache.read([3, 0], fields=["last"])
    expected = np.concatenate([source.states[n]["hidden-2"] for n in (3, 0)])
    np.testing.assert_array_equal(batch.hidden["last"], expected)
    assert set(batch.hidden) == {"last"}
    [first] = cache.batches(13, fields=["last", "hidden-2"], shuffle=False)
    np.testing.assert_array_equal(first.hidden["last"], first.hidden["hidden-2"])


def test_no_last_layer(tmp_path):
    path = SyntheticCache(hidden=("hidden-1",)).write(tmp_path / "cache")
    with pytest.raises(CacheError, match="the cache has no field 'last'; it holds tokens, targets, hidden-1"):
        open_cache(path).read([0], fields=["last"])


def test_a_sound_object_that_is_not_the_recorded_one_is_refused(copy):
    """Such as that of another shard of the same shape: the checksums of its chunks agree."""
    cache = open_cache(str(copy))
    shard, field = cache.manifest.shards[0], cache.manifest.field("hidden-1")
    arrays = cache._open_shard(0, ("hidden-1",)).fields["hidden-1"].arrays
    data = pack({array.path: arrays[array.name] + 1 for array in field.arrays})
    (copy / shard.objects["hidden-1"].path).write_bytes(data)
    change_manifest(copy, set_at("shards", 0, "objects", "hidden-1", "num_bytes", len(data)))
    with pytest.raises(CorruptCacheError, match=r"shard 0, field hidden-1, file .* not the recorded file"):
        open_cache(str(copy)).read([0], fields=["hidden-1"])
    assert open_cache(str(copy), check_crc=False).read([0], fields=["hidden-1"])
