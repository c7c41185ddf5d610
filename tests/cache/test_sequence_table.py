"""The per-sequence table of an open cache: columns are read when they are used, and each at most once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from kdcache.cache import layout, lookup, open_cache, sequence_table
from kdcache.cache.curriculum import Curriculum
from kdcache.errors import CorruptCacheError
from tests.cache.test_stranger import replace_object
from tests.caches import SOURCE


@pytest.fixture
def reads(monkeypatch):
    """How often a column of the table of a shard is decoded, by file and column; `footers` counts bare schemas."""
    counts = Counter()
    real = sequence_table._read_columns

    def read(folder, shard, names, **how):
        schema, found = real(folder, shard, names, **how)
        counts.update((shard.index, name) for name in found)
        return schema, found

    monkeypatch.setattr(sequence_table, "_read_columns", read)
    return counts


def columns(reads) -> set[str]:
    return {name for _, name in reads}


def test_a_run_reads_every_column_once_and_no_other(sound, reads):
    cache = open_cache(str(sound))
    for _ in range(2):
        assert (cache.lengths_N == SOURCE.lengths).all()
        assert cache.sizes_N.shape == (13,)
        chosen_N = cache.where("num_positions > 2 and teacher_loss < 100")
        Curriculum().ranking(cache.sequences, chosen_N, "x")
        cache.sequence_table(["num_targets", "teacher_loss", "kept_mass"])
        next(iter(cache.batches(4, where="teacher_loss < 100")))
    used = {"num_positions", "teacher_loss", "num_targets", "kept_mass"}  # num_tokens too, in caches that have it
    assert columns(reads) == used
    assert set(reads.values()) == {1}
    assert len(reads) == len(used) * cache.manifest.num_shards


def test_the_whole_table_reads_only_what_is_missing(sound, reads):
    cache = open_cache(str(sound))
    assert cache.lengths_N.sum() > 0
    whole = cache.sequence_table()
    assert cache.sequence_table() == whole
    assert set(reads.values()) == {1}
    assert columns(reads) == set(whole.column_names)


def test_names_and_types_decode_nothing(sound, reads):
    cache = open_cache(str(sound))
    assert "teacher_loss" in cache.sequences.column_names
    assert cache.sequences.schema.field("teacher_loss").type in (pa.float32(), pa.float64())
    assert cache.sequences.get("nonsense") is None
    assert not reads


def test_rows_of_a_shard_are_read_together(sound, reads):
    cache = open_cache(str(sound))
    table = cache.sequence_table().to_pylist()
    reads.clear()
    assert [cache.metadata(index) for index in range(5)] == table[:5]
    assert set(reads.values()) == {1}
    assert {shard for shard, _ in reads} == {0}


def test_the_plan_is_read_once_for_each_column(sound, monkeypatch):
    real, counts = lookup.checked_plan_table, []
    monkeypatch.setattr(lookup, "checked_plan_table", lambda *a: counts.append(1) or real(*a))
    cache = open_cache(str(sound))
    names = cache.sequence_table(["document_id"])["document_id"].to_pylist()
    for number, name in enumerate(names):
        assert number in cache.find(document=name)
    assert len(counts) == 1
    whole = cache.plan_table()
    assert cache.plan_table() == whole == lookup.read_plan_table(cache.folder, cache.manifest)


def table_of_shard_0(cache) -> pa.Table:
    return sequence_table.load_table(cache.folder, cache.manifest.shards[0])


def test_a_column_that_a_shard_lacks_is_null_there_unless_it_is_required(copy):
    table = table_of_shard_0(open_cache(str(copy)))
    replace_object(copy, "sequences", layout.table_to_ipc(table.drop_columns(["teacher_loss"])))
    cache = open_cache(str(copy))
    first = cache.manifest.shards[0].num_sequences
    assert cache.sequences["teacher_loss"].null_count == first
    assert cache.where("teacher_loss < 1e9").tolist() == list(range(first, 13))
    with pytest.raises(CorruptCacheError, match=r"shard 0, field sequences, .* no column 'teacher_loss'"):
        cache.sequence_table(["teacher_loss"])
    assert cache.sequence_table()["teacher_loss"].null_count == first


@pytest.mark.parametrize("change", ["type", "twice", "rows"])
def test_a_table_from_a_stranger(copy, change):
    table = table_of_shard_0(open_cache(str(copy)))
    losses = table["teacher_loss"]
    index = table.column_names.index("teacher_loss")
    changed = {
        "type": lambda: table.set_column(index, "teacher_loss", losses.cast(pa.string())),
        "twice": lambda: table.append_column("teacher_loss", losses),
        "rows": lambda: table.slice(1),
    }[change]()
    replace_object(copy, "sequences", layout.table_to_ipc(changed))
    with pytest.raises(CorruptCacheError, match="field sequences"):
        open_cache(str(copy)).sequence_table()


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_equal_to_reading_all_tables_one_below_another(written, kind):
    cache = open_cache(str(written(kind)))
    tables = [sequence_table.load_table(cache.folder, shard) for shard in cache.manifest.shards]
    expected = pa.concat_tables(tables, promote_options="default")
    assert cache.sequence_table().equals(expected, check_metadata=True)
    np.testing.assert_array_equal(cache.sequences["num_positions"], expected["num_positions"])
