"""Sequences of several shards, read together, are to the bit what they are when each is read alone."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import layout, open_cache
from kdcache.cache.shard_file import pack
from kdcache.codecs import TargetsCodec
from kdcache.errors import CorruptCacheError
from kdcache.schema import Samples
from tests.cache.test_stranger import change_manifest, set_at
from tests.caches import KINDS, RECORDS
from tests.contracts.matching import check_samples
from tests.synthetic import SyntheticCache

CODECS = ("compact", "fp16", "bf16", "exact")
VECTOR_CODECS = ("int8", "fp16", "bf16", "exact")
#: Neighbours, one of each shard (of 4, 4, 4 and 1), there and back, the same twice in a row and apart.
READS = ([0, 1, 2], [0, 4, 8, 12], [12, 3, 9, 4, 8, 0], [5, 5, 11, 5], range(13), range(12, -1, -1), [3, 4, 7, 8])


def check_same(batch, alone):
    """Each sequence of ``batch`` is what it is ``alone``."""
    for n, one in enumerate(alone):
        rows = slice(*batch.position_offsets_N1[n : n + 2])
        tokens = slice(*batch.token_offsets_N1[n : n + 2])
        np.testing.assert_array_equal(batch.tokens_T[tokens], one.tokens_T)
        np.testing.assert_array_equal(batch.loss_mask_P[rows], one.loss_mask_P)
        if one.segment_ids_T is not None:
            np.testing.assert_array_equal(batch.segment_ids_T[tokens], one.segment_ids_T)
        for name, expected in vars(one.targets).items():
            found = getattr(batch.targets, name)
            assert (found is None) is (expected is None), name
            if isinstance(expected, Samples):
                check_samples(Samples(found.ids_PJ[rows], found.counts_PJ[rows]), expected)
            elif expected is not None:
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found[rows], expected, err_msg=name)
        assert set(batch.hidden) == set(one.hidden)
        for name, states in one.hidden.items():
            assert batch.hidden[name].dtype == states.dtype
            np.testing.assert_array_equal(batch.hidden[name][rows], states, err_msg=name)
    assert batch.position_offsets_N1[-1] == len(batch.loss_mask_P) == batch.targets.num_positions


def check_reads(path, reads, hidden=(), **settings):
    cache = open_cache(str(path), **settings)
    alone = [cache.read([index], fields=hidden) for index in range(13)]
    for indices in reads:
        batch = cache.read(indices, fields=hidden)
        assert batch.indices == list(indices)
        check_same(batch, [alone[index] for index in indices])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_codec(tmp_path, kind, codec):
    SyntheticCache(record=RECORDS[kind], codec=codec, packed=True).write(tmp_path)
    check_reads(tmp_path, READS)


@pytest.mark.parametrize("vector_codec", VECTOR_CODECS)
def test_every_codec_of_hidden_states(tmp_path, vector_codec):
    SyntheticCache(codec="compact", hidden=("hidden-1", "hidden-2"), hidden_codec=vector_codec).write(tmp_path)
    check_reads(tmp_path, READS, ("hidden-2", "hidden-1"))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 4))
def test_any_read_with_few_open_shards(written, indices, max_open_shards):
    check_reads(written("hybrid"), [indices], max_open_shards=max_open_shards)


def arrays_of(batch):
    targets = {name: value for name, value in vars(batch.targets).items() if isinstance(value, np.ndarray)}
    named = {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    return {**named, **targets, **batch.hidden}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("indices", [[0, 5, 9], [5], [5, 6]])  # rows of one span are not gathered
def test_who_changes_what_was_read_does_not_change_the_next_read(tmp_path, codec, indices):
    SyntheticCache(codec=codec, hidden=("hidden-1",), hidden_codec="exact", packed=True).write(tmp_path)
    cache = open_cache(str(tmp_path))
    first = cache.read(indices, fields=["hidden-1"])
    expected = {name: values.copy() for name, values in arrays_of(first).items()}
    assert first.tokens_T.flags.writeable
    assert first.loss_mask_P.flags.writeable
    for values in arrays_of(first).values():
        if values.flags.writeable:
            values[:] = 0
    again = arrays_of(cache.read(indices, fields=["hidden-1"]))
    for name, values in expected.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)


def test_shards_whose_rows_have_different_numbers_of_draws(written):
    cache = open_cache(str(written("sampled")))
    widths = {cache.read([index]).targets.samples.ids_PJ.shape[1] for index in (0, 4, 8, 12)}
    assert len(widths) > 1
    batch = cache.read([12, 0, 4, 8])
    assert batch.targets.samples.ids_PJ.shape[1] == max(widths)


@pytest.mark.parametrize(("kind", "table"), [("min_prob", "id_table"), ("sampled", "sample_table")])
def test_damage_names_its_shard_among_several(tmp_path, kind, table):
    SyntheticCache(record=RECORDS[kind], codec="compact").write(tmp_path)
    cut_table(tmp_path, 2, table)
    cache = open_cache(str(tmp_path))
    with pytest.raises(CorruptCacheError, match=rf"shard 2, field targets, file \S+: a rank is \d+, but {table} has 1"):
        cache.read([0, 4, 9, 12])
    check_same(cache.read([0, 4]), [cache.read([0]), cache.read([4])])


def cut_table(path, shard, name):
    """Rewrite a shard with only the first entry of a table."""
    manifest = open_cache(str(path)).manifest
    record = manifest.shards[shard].objects["targets"]
    group = zarr.open_group(zarr.storage.ZipStore(path / record.path, mode="r"), mode="r")
    arrays = {array.path: np.array(group[array.path][:]) for array in manifest.field("targets").arrays}
    data = pack({key: values[:1] if key == f"table/{name}" else values for key, values in arrays.items()})
    (path / record.path).write_bytes(data)
    change_manifest(path, set_at("shards", shard, "objects", "targets", "num_bytes", len(data)))
    change_manifest(path, set_at("shards", shard, "objects", "targets", "sha256", layout.sha256(data)))


@pytest.mark.parametrize("kind", ["tail prior", "min_prob", "hybrid"])
def test_all_shards_are_decoded_by_one_call(written, kind, monkeypatch):
    calls: list[int] = []
    real = TargetsCodec.decode
    monkeypatch.setattr(TargetsCodec, "decode", lambda codec, arrays: calls.append(1) or real(codec, arrays))
    open_cache(str(written(kind))).read([12, 0, 4, 8])
    assert len(calls) == 1
