"""A cache as Arrow and as a Hugging Face data set: the values that `Cache.read` gives, a few at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import kdcache
from kdcache.errors import CacheError, CorruptCacheError
from tests.caches import KINDS
from tests.synthetic import SyntheticCache
from tests.task_models import TINY_TASKS


@pytest.fixture(autouse=True)
def own_datasets_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def assert_equal(row: dict, cache: kdcache.Cache, index: int, **reading) -> None:
    """Compare a row with what is read of that sequence alone."""
    gives_numbers = cache.manifest.targets.kind == "outputs"
    batch = cache.read([index], **({"fields": ["outputs"]} if gives_numbers else {}) | reading)
    targets = batch.targets
    expected = {
        "tokens": batch.tokens_T,
        "segment_ids": batch.segment_ids_T,
        "loss_mask": batch.loss_mask_P,
        "labels": batch.labels_P,
        "token_index": batch.token_index_P,
        "num_kept": targets.num_kept_P,
        "ids": targets.ids_PK if targets.top_k else None,
        "logprobs": targets.logprobs_PK if targets.top_k else None,
        "log_tail": targets.log_tail_P,
        "log_tails": targets.log_tails_PG,
        "gold_logprob": targets.gold_logprob_P,
        "entropy": targets.entropy_P,
        **batch.hidden,
    }
    if gives_numbers:
        expected |= dict.fromkeys(("log_tail", "gold_logprob", "entropy"))
    names = {name for name, values in expected.items() if values is not None}
    names |= {"sample_ids", "sample_counts"} if targets.samples is not None else set()
    assert names | set(cache.sequence_table().column_names) == set(row)
    for name in names - {"sample_ids", "sample_counts"}:
        np.testing.assert_array_equal(np.array(row[name]), expected[name], err_msg=name)
    if targets.samples is not None:
        pairs = zip(targets.samples.ids_PJ, targets.samples.counts_PJ, strict=True)
        drawn = [(ids[counts > 0].tolist(), counts[counts > 0].tolist()) for ids, counts in pairs]
        assert list(zip(row["sample_ids"], row["sample_counts"], strict=True)) == drawn
    assert cache.metadata(index) == {name: row[name] for name in cache.sequence_table().column_names}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_is_read(kind, written) -> None:
    cache = kdcache.open_cache(str(written(kind)))
    table = kdcache.to_arrow(cache)
    assert table.num_rows == len(cache)
    for index, row in enumerate(table.to_pylist()):
        assert_equal(row, cache, index)


@pytest.mark.parametrize("task", TINY_TASKS)
def test_rows_of_other_tasks(task, task_caches) -> None:
    cache = kdcache.open_cache(str(task_caches[task]))
    table = kdcache.to_arrow(cache)
    assert table.num_rows == len(cache)
    for index, row in enumerate(table.to_pylist()):
        assert_equal(row, cache, index)
    dataset = kdcache.to_hf_dataset(cache, [3, 0])
    for index, row in zip([3, 0], dataset, strict=True):
        assert_equal(row, cache, index)


def test_outputs_of_classes_are_a_column_when_asked_for(task_caches) -> None:
    cache = kdcache.open_cache(str(task_caches["sequence-classification"]))
    assert "outputs" not in kdcache.to_arrow(cache).column_names
    table = kdcache.to_arrow(cache, fields=["outputs"])
    assert table.schema.field("outputs").type == pa.list_(pa.list_(pa.float32(), 3))
    for index, row in enumerate(table.to_pylist()):
        assert_equal(row, cache, index, fields=["outputs"])


def test_numbers_are_columns_and_nothing_is_said_of_a_distribution(task_caches) -> None:
    cache = kdcache.open_cache(str(task_caches["ranking"]))
    table = kdcache.to_arrow(cache, fields=["outputs"])
    assert table.schema == kdcache.to_arrow(cache).schema
    assert table.schema.field("outputs").type == pa.list_(pa.list_(pa.float32(), 1))
    assert table.schema.field("labels").type == pa.list_(pa.float32())
    assert not {"ids", "logprobs", "log_tail", "gold_logprob", "entropy"} & set(table.column_names)
    assert all(len(row["outputs"]) == row["num_positions"] for row in table.to_pylist())


def test_packed_cache_with_hidden_states_in_any_order(sound) -> None:
    cache = kdcache.open_cache(str(sound))
    indices, reading = [11, 0, 0, 7], {"fields": ["hidden-2"], "top_k": 2}
    table = kdcache.to_arrow(cache, indices, **reading)
    assert table["sequence"].to_pylist() == indices
    for index, row in zip(indices, table.to_pylist(), strict=True):
        assert_equal(row, cache, index, **reading)
    assert table.schema.field("ids").type == pa.list_(pa.list_(pa.int32(), 2))
    assert table.schema.field("hidden-2").type == pa.list_(pa.list_(pa.float32(), 6))


def test_no_rows_have_the_same_columns(sound) -> None:
    cache = kdcache.open_cache(str(sound))
    assert kdcache.to_arrow(cache, []).schema == kdcache.to_arrow(cache).schema
    assert kdcache.to_arrow(cache, []).num_rows == 0


def test_columns_of_the_corpus_keep_away_from_those_of_the_teacher(tmp_path) -> None:
    class Named(SyntheticCache):
        def table(self) -> pa.Table:
            return super().table().append_column("ids", pa.array(["mine"] * len(self.tokens)))

    Named(3).write(tmp_path)
    cache = kdcache.open_cache(str(tmp_path))
    table = kdcache.to_arrow(cache)
    assert table["table_ids"].to_pylist() == ["mine"] * 3
    np.testing.assert_array_equal(table["ids"][0].as_py(), cache[0].targets.ids_PK)


def test_a_stream_holds_a_few_positions_at_a_time(written) -> None:
    cache = kdcache.open_cache(str(written("temperatures")), max_open_shards=1)
    batches = list(kdcache.to_arrow_reader(cache, batch_positions=10))
    assert len(batches) > 4
    for batch in batches:
        lengths = batch["num_positions"].to_pylist()
        assert sum(lengths[:-1]) < 10
    assert pa.Table.from_batches(batches).equals(kdcache.to_arrow(cache).combine_chunks())


def test_a_stream_reads_no_further_than_it_was_asked(written, monkeypatch) -> None:
    cache = kdcache.open_cache(str(written("temperatures")))
    asked: list[int] = []
    read = cache.read
    monkeypatch.setattr(cache, "read", lambda indices, **more: (asked.extend(indices), read(indices, **more))[1])
    reader = kdcache.to_arrow_reader(cache, batch_positions=10)
    assert asked == [0]  # for the schema
    num_rows = reader.read_next_batch().num_rows
    assert asked[1:] == list(range(num_rows))


def test_mistakes_are_told_at_once(sound, copy) -> None:
    cache = kdcache.open_cache(str(sound))
    with pytest.raises(CacheError, match="there is no sequence 13"):
        kdcache.to_arrow_reader(cache, [0, 13])
    with pytest.raises(CacheError, match="there is no sequence -1"):
        kdcache.to_arrow_reader(cache, [-1])
    with pytest.raises(CacheError, match="top_k 9"):
        kdcache.to_arrow_reader(cache, top_k=9)
    with pytest.raises(CacheError, match="hidden-3"):
        kdcache.to_arrow_reader(cache, fields=["hidden-3"])
    broken = kdcache.open_cache(str(copy))
    record = broken.manifest.shards[2].objects["targets"]
    Path(copy, record.path).write_bytes(b"")
    with pytest.raises(CorruptCacheError, match="shard 2"):
        kdcache.to_arrow(broken)


@pytest.mark.parametrize("kind", ["all of top-k", "hybrid", "sampled"])
def test_hf_dataset_has_the_same_rows(kind, written) -> None:
    cache = kdcache.open_cache(str(written(kind)))
    dataset = kdcache.to_hf_dataset(cache, [5, 2])
    assert len(dataset) == 2
    for index, row in zip([5, 2], dataset, strict=True):
        assert_equal(row, cache, index)


def test_hf_dataset_of_hidden_states(sound, tmp_path) -> None:
    cache = kdcache.open_cache(str(sound))
    reading = {"fields": ["hidden-1"], "top_k": 3}
    dataset = kdcache.to_hf_dataset(cache, directory=tmp_path / "mine", **reading)
    assert dataset.features["ids"].feature.length == 3
    assert_equal(dataset[12], cache, 12, **reading)
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_hf_dataset_is_written_once(sound, tmp_path) -> None:
    cache = kdcache.open_cache(str(sound))
    kdcache.to_hf_dataset(cache)
    (file,) = (tmp_path / "hf" / "kdcache").iterdir()
    before = file.stat().st_mtime_ns
    assert len(kdcache.to_hf_dataset(cache, range(13))) == 13
    assert file.stat().st_mtime_ns == before
    kdcache.to_hf_dataset(cache, top_k=1)
    assert len(list(file.parent.iterdir())) == 2


def test_interrupted_writing_leaves_nothing(copy, tmp_path) -> None:
    cache = kdcache.open_cache(str(copy))
    Path(copy, cache.manifest.shards[2].objects["targets"].path).write_bytes(b"")
    with pytest.raises(CorruptCacheError):
        kdcache.to_hf_dataset(cache)
    assert list((tmp_path / "hf" / "kdcache").iterdir()) == []


def test_nothing_of_it_imports_torch(sound, tmp_path) -> None:
    code = (
        "import sys, kdcache\n"
        f"cache = kdcache.open_cache({str(sound)!r})\n"
        f"print(len(kdcache.to_hf_dataset(cache, directory={str(tmp_path)!r})), kdcache.to_arrow(cache).num_rows)\n"
        "print('torch' in sys.modules)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["13", "13", "False"]
