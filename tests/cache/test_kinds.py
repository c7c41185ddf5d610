"""Caches of every kind of targets: written, read in any order, verified, damaged."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import open_cache
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.inspect import inspect_cache
from kdcache.schema import Targets
from kdcache.verify.stored import verify_cache
from tests.cache.test_reader import check_batch, check_targets
from tests.caches import KINDS
from tests.contracts.matching import check_merged, check_samples, in_order_of
from tests.synthetic import WIDTH, SyntheticCache

kinds = pytest.mark.parametrize("kind", KINDS)


def last_of(kind: str) -> tuple[str, ...]:
    return ("last",) if kind == "hidden" else ()


@kinds
@pytest.mark.parametrize(
    "indices", [[0], range(13), range(12, -1, -1), [3, 3, 3], [9, 0, 9, 12, 1], [0, 2], [8, 10, 11]], ids=str
)
def test_any_order_any_subset(written, kind, indices):
    batch = open_cache(str(written(kind))).read(indices)
    check_batch(batch, KINDS[kind], indices, last_of(kind))
    check_merged(batch.targets)


@given(st.sampled_from(list(KINDS)), st.lists(st.integers(0, 12), min_size=1, max_size=20), st.integers(1, 4))
def test_random_reads(written, kind, indices, max_open_shards):
    cache = open_cache(str(written(kind)), max_open_shards=max_open_shards)
    check_batch(cache.read(indices), KINDS[kind], indices, last_of(kind))


@kinds
def test_records_say_how_many_entries_and_draws_a_shard_has(written, kind):
    source, manifest = KINDS[kind], open_cache(str(written(kind))).manifest
    assert manifest.targets == source.record
    for shard, start, stop in zip(manifest.shards, source.starts, source.starts[1:], strict=False):
        targets = Targets.concatenate(source.targets[start:stop])
        assert shard.num_rows.get("entries", 0) == (0 if targets.num_kept_P is None else targets.num_kept_P.sum())
        assert shard.num_rows.get("samples", 0) == (
            0 if targets.samples is None else (targets.samples.counts_PJ > 0).sum()
        )


@kinds
@pytest.mark.parametrize("codec", ["compact", "fp16"])
def test_compressed_too_every_sequence_decodes_alone_as_in_company(tmp_path, kind, codec):
    source = SyntheticCache(record=KINDS[kind].record, codec=codec)
    source.write(tmp_path)
    cache = open_cache(str(tmp_path))
    whole = cache.read(range(13))
    expected = Targets.concatenate(source.targets)
    in_order_of(expected.ids_PK, whole.targets.ids_PK, whole.targets.logprobs_PK)
    check_samples(whole.targets.samples, expected.samples)
    check_merged(whole.targets)
    for index in (0, 5, 12):
        rows = slice(whole.position_offsets_N1[index], whole.position_offsets_N1[index + 1])
        check_targets(cache.read([index]).targets, whole.targets.take(rows))


@kinds
def test_every_kind_verifies(written, kind):
    report = verify_cache(str(written(kind)), deep=True)
    assert report.problems == []
    assert inspect_cache(open_cache(str(written(kind))))["targets"]["kind"] == KINDS[kind].record.kind


def test_the_last_state_comes_along_and_by_its_name_if_asked_for(written):
    cache = open_cache(str(written("hidden")))
    assert set(cache.read([3]).hidden) == {"last"}
    batch = cache.read([3, 12], fields=["hidden-2"])
    assert set(batch.hidden) == {"last", "hidden-2"}
    np.testing.assert_array_equal(batch.hidden["last"], batch.hidden["hidden-2"])


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "exact"])
def test_the_last_state_in_every_codec(tmp_path, codec):
    source = SyntheticCache(record=KINDS["hidden"].record, hidden_codec=codec, hidden=("hidden-1",))
    source.write(tmp_path)
    assert verify_cache(str(tmp_path), deep=True).problems == []
    cache = open_cache(str(tmp_path))
    order = [12, 3, 3, 0, 1, 7]
    batch = cache.read(order, fields=["hidden-1"])
    for name, field in (("last", "hidden-2"), ("hidden-1", "hidden-1")):
        expected = np.concatenate([source.states[n][field] for n in order])
        assert batch.hidden[name].shape == (len(expected), WIDTH)
        error = np.linalg.norm(batch.hidden[name] - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() <= 0.02
    alone = cache.read([7]).hidden["last"]
    np.testing.assert_array_equal(alone, batch.hidden["last"][-len(alone) :])


def test_the_lm_head_is_handed_out_as_it_was_given(written):
    cache = open_cache(str(written("hidden")))
    assert cache.lm_head_file() == KINDS["hidden"].cache_files()["lm_head.safetensors"]
    with pytest.raises(CacheError, match="has no LM head; only targets of the kind hidden have one"):
        open_cache(str(written("sampled"))).lm_head_file()


def chunks_of(path: Path, array: str) -> list[tuple[int, int]]:
    """Where the chunks of an array lie in an object: offset and size of each."""
    with zipfile.ZipFile(path) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.startswith(f"{array}/c/")]
    # Entries have no extra field, so their content follows a header of 30 bytes and the name.
    return [(entry.header_offset + 30 + len(entry.filename), entry.file_size) for entry in found]


ARRAYS = {
    "all of top-k": ["entries/topk_ids", "entries/topk_logprobs", "positions/num_kept", "positions/log_tails"],
    "hybrid": ["positions/num_sampled", "samples/sample_counts", "samples/sample_ranks", "table/sample_table"],
}


@pytest.mark.parametrize(("kind", "array"), [(kind, array) for kind, arrays in ARRAYS.items() for array in arrays])
def test_a_flipped_byte_in_a_chunk_is_found_and_named(copy_of, kind, array):
    path = copy_of(kind)
    item = open_cache(str(path)).manifest.shards[1].objects["targets"]
    data = bytearray((path / item.path).read_bytes())
    [(offset, size)] = chunks_of(path / item.path, array)
    data[offset + size // 2] ^= 1
    (path / item.path).write_bytes(data)
    [problem] = verify_cache(str(path), deep=True).problems
    assert problem == f"shard 1, field targets: file {item.path} is damaged (its sha256 is not the recorded one)"
    with pytest.raises(CorruptCacheError) as caught:
        open_cache(str(path)).read([5])
    for word in ("shard 1", "field targets", item.path, f"array {array}", "chunk 0"):
        assert word in str(caught.value)
    open_cache(str(path)).read([0])  # other shards are sound


@pytest.mark.parametrize("array", ["positions/states", "positions/token_scale", "table/channel_scale"])
def test_a_flipped_byte_of_int8_states(tmp_path, array):
    SyntheticCache(record=KINDS["hidden"].record, hidden_codec="int8").write(tmp_path)
    item = open_cache(str(tmp_path)).manifest.shards[0].objects["hidden-2"]
    data = bytearray((tmp_path / item.path).read_bytes())
    [(offset, size)] = chunks_of(tmp_path / item.path, array)
    data[offset + size // 2] ^= 1
    (tmp_path / item.path).write_bytes(data)
    assert "shard 0, field hidden-2" in "".join(verify_cache(str(tmp_path)).problems)
    with pytest.raises(CorruptCacheError, match=rf"shard 0, field hidden-2, file .*, array {array} .*chunk 0"):
        open_cache(str(tmp_path)).read([0])


def test_a_store_that_is_no_disk():
    source = KINDS["all of top-k"]
    source.write("memory://kinds/cache", shards=range(2), finish=False)
    source.write("memory://kinds/cache")
    cache = open_cache("memory://kinds/cache")
    check_batch(cache.read([12, 0, 5]), source, [12, 0, 5])
    assert cache.tail_prior_V.shape == (50,)
    assert verify_cache("memory://kinds/cache", deep=True).problems == []
