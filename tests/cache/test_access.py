"""Parts of a cache: fewer ids, one sequence, sequences by filter or by where they come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import kdcache
from kdcache.errors import CacheError, ConfigError, CorruptCacheError
from kdcache.schema import TargetsRecord
from tests.caches import KINDS
from tests.synthetic import SyntheticCache
from tests.transcode.test_cut import compare

ORDER = [12, 0, 5, 5]


@pytest.mark.parametrize("kind", ["min_prob", "min_mass", "temperatures", "tail prior", "all of top-k"])
def test_fewer_ids_are_those_of_a_cache_with_fewer(kind, written, tmp_path) -> None:
    """Both caches are of the same distributions, cut by different K before they were written."""
    record = KINDS[kind].record.model_copy(update={"top_k": 3})
    SyntheticCache(record=record).write(tmp_path)
    found = kdcache.open_cache(str(written(kind))).read(ORDER, top_k=3)
    expected = kdcache.open_cache(str(tmp_path)).read(ORDER)
    assert found.targets.top_k == 3
    compare(found.targets, expected.targets)
    np.testing.assert_array_equal(found.tokens_T, expected.tokens_T)
    mass = np.exp(found.targets.logprobs_PK.astype(float)).sum(1) + np.exp(found.targets.log_tail_P.astype(float))
    np.testing.assert_allclose(mass, 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["temperatures", "hybrid", "hidden"])
def test_as_many_ids_as_there_are_changes_nothing(kind, written) -> None:
    cache = kdcache.open_cache(str(written(kind)))
    found, expected = (cache.read(ORDER, top_k=k).targets for k in (cache.manifest.top_k, None))
    compare(dataclasses.replace(found, samples=None), dataclasses.replace(expected, samples=None), atol=0)


@pytest.mark.parametrize(
    ("kind", "top_k", "message"),
    [
        ("temperatures", 5, r"temperatures: top_k 5 was asked for, but it keeps at most 4 ids"),
        ("temperatures", 0, r"top_k 0 was asked for; it must be a whole number from 1 to the 4"),
        ("temperatures", 2.0, r"top_k 2\.0 was asked for; it must be a whole number"),
        ("temperatures", True, r"must be a whole number"),
        ("sampled", 1, r"kind sampled keep no ids with their probabilities"),
        ("hybrid", 1, r"its 7 samples are from the mass outside the 2 kept ids"),
        ("hybrid", 3, r"top_k 3 was asked for, but it keeps at most 2"),
    ],
)
def test_ids_that_there_are_not(kind, top_k, message, written) -> None:
    cache = kdcache.open_cache(str(written(kind)))
    with pytest.raises(CacheError, match=message):
        cache.read([0], top_k=top_k)
    with pytest.raises(CacheError, match=message):
        next(iter(cache.batches(top_k=top_k)))


def test_one_sequence_by_its_number(sound) -> None:
    cache = kdcache.open_cache(str(sound))
    assert cache[3].indices == [3]
    np.testing.assert_array_equal(cache[-1].tokens_T, cache.read([12]).tokens_T)
    assert [item.indices[0] for item in cache] == list(range(13))
    with pytest.raises(IndexError, match=r"there is no sequence 13; .* has 13 \(0 to 12\)"):
        cache[13]
    with pytest.raises(IndexError):
        cache[-14]


def test_sequences_by_filter(dumped) -> None:
    cache = kdcache.open_cache(str(dumped))
    chosen = cache.where("num_positions > 10 and source != 'page 2'")
    expected = [
        row["sequence"]
        for row in cache.sequence_table().to_pylist()
        if row["num_positions"] > 10 and row["source"] != "page 2"
    ]
    assert chosen.tolist() == expected
    assert chosen.dtype == np.int64
    assert len(cache.read(chosen)) == len(expected)
    with pytest.raises(ConfigError, match="num_position"):
        cache.where("num_position > 10")


def test_sequences_by_document(dumped) -> None:
    cache = kdcache.open_cache(str(dumped))
    rows = cache.sequence_table().to_pylist()
    longest = max((row["document_id"] for row in rows), key=[row["document_id"] for row in rows].count)
    expected = [row["sequence"] for row in rows if row["document_id"] == longest]
    assert len(expected) > 1
    assert cache.find(document=longest).tolist() == expected
    assert cache.find(sequence=rows[4]["sequence_id"]).tolist() == [4]
    with pytest.raises(CacheError, match=r"no sequence has the document_id 'page 9'; the first document_id is"):
        cache.find(document="page 9")
    with pytest.raises(TypeError, match="either"):
        cache.find()
    with pytest.raises(TypeError, match="either"):
        cache.find(document="a", sequence="b")


def test_a_document_in_the_middle_of_a_window(tmp_path, teacher_dir, corpus_file) -> None:
    from kdcache.config import build

    settings = {
        "output": str(tmp_path / "packed"),
        "teacher": {"model": str(teacher_dir), "device": "cpu"},
        "corpus": {"paths": [str(corpus_file)]},
        "sequences": {"max_length": 64, "packing": "window"},
        "targets": {"top_k": 2, "codec": "exact"},
    }
    kdcache.dump_teacher(build(kdcache.DumpConfig, settings), progress=False)
    cache = kdcache.open_cache(str(tmp_path / "packed"))
    firsts = set(cache.sequence_table()["document_id"].to_pylist())
    inside = next(row for row in cache.plan_table().to_pylist() if row["document_id"] not in firsts)
    assert inside["sequence"] in cache.find(document=inside["document_id"])


def test_a_plan_that_is_damaged(copy) -> None:
    Path(copy, "plan.parquet").write_bytes(b"nothing")
    with pytest.raises(CorruptCacheError, match=r"plan\.parquet is missing or damaged"):
        kdcache.open_cache(str(copy)).find(document="document 1")


def test_ids_that_the_plan_does_not_have(sound) -> None:
    with pytest.raises(CacheError, match=r"unknown column .sequence_id. of plan\.parquet; known: sequence, "):
        kdcache.open_cache(str(sound)).find(sequence="document 1@0")


def test_a_record_of_hidden_states_keeps_its_states(written) -> None:
    cache = kdcache.open_cache(str(written("hidden")))
    assert cache.manifest.targets == TargetsRecord(kind="hidden", top_k=1)
    assert "last" in cache.read([0], top_k=1).hidden


def test_a_cache_is_a_context_manager_and_closes(sound):
    with kdcache.open_cache(str(sound)) as cache:
        assert cache.read([3]).indices == [3]
        assert len(cache.lengths_N) == 13
        assert cache.open_bytes() > 0
    assert cache.open_bytes() == 0
    for use in (
        lambda: cache.read([3]),
        lambda: cache[3],
        lambda: cache.sequence_table(),
        lambda: cache.plan_table(),
        lambda: cache.metadata(3),
        lambda: cache.where("num_positions > 1"),
        lambda: cache.find(document="page 3"),
        lambda: cache.tokenizer_json(),
        lambda: next(iter(cache.batches(2))),
    ):
        with pytest.raises(CacheError, match=r"the cache .* is closed; open it again"):
            use()
    cache.close()  # again, which is nothing
    assert len(cache) == 13
