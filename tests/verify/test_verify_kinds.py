"""Deep checks and manifests from strangers, for what only some kinds of targets have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import layout, open_cache
from kdcache.cache.shard_file import pack
from kdcache.errors import CorruptCacheError
from kdcache.schema import TargetsRecord
from kdcache.verify.stored import verify_cache
from tests.cache.test_stranger import change_manifest, set_at
from tests.caches import KINDS
from tests.synthetic import SyntheticCache

# -------------------------------------------------------------------------- a writer that wrote nonsense correctly


def a_draw_too_many(targets):
    targets.samples.counts_PJ[0, 0] += 1


def a_draw_missing(targets):
    targets.samples.counts_PJ[0, 0] -= 1


def no_samples(targets):
    targets.samples.counts_PJ[0] = 0


def a_drawn_id_twice(targets):
    drawn = int((targets.samples.counts_PJ[0] > 0).sum())
    assert drawn > 1
    targets.samples.ids_PJ[0, 1] = targets.samples.ids_PJ[0, 0]


def a_drawn_id_that_is_kept(targets):
    targets.samples.ids_PJ[0, 0] = targets.ids_PK[0, 0]


def a_drawn_id_outside(targets):
    targets.samples.ids_PJ[0, 0] = 50


def draws_beside_no_tail(targets):
    targets.log_tail_P[0] = -np.inf
    targets.logprobs_PK[0] -= np.log(np.exp(targets.logprobs_PK[0]).sum())


def no_id_is_kept(targets):
    targets.num_kept_P[0] = 0
    targets.logprobs_PK[0] = -np.inf


def positive_tails(targets):
    targets.log_tails_PG[0, 1] = 0.01


def nan_tails(targets):
    targets.log_tails_PG[0, 0] = np.nan


NONSENSE = [
    ("sampled", a_draw_too_many, "array sample_counts, row 3: 13 samples, the plan says 12"),
    ("sampled", a_draw_missing, "array sample_counts, row 3: 11 samples, the plan says 12"),
    ("sampled", no_samples, "a row has 0 samples, the plan says 12"),
    ("hybrid", no_samples, "a row has 0 samples, the plan says 7"),
    ("sampled", a_drawn_id_twice, "keeps the same id twice"),
    ("hybrid", a_drawn_id_twice, "keeps the same id twice"),
    ("hybrid", a_drawn_id_that_is_kept, "keeps the same id twice"),
    ("sampled", a_drawn_id_outside, "array sample_table, row 18: 50 is not below 50, the number of ids"),
    ("hybrid", a_drawn_id_outside, "array sample_table, row 20: 50 is not below 50, the number of ids"),
    ("min_prob", no_id_is_kept, "array num_kept, row 3: 0 ids are kept, expected at least 1"),
    ("temperatures", positive_tails, "array log_tails, row 3, column 1: 0.00999"),
    ("temperatures", nan_tails, "array log_tails, row 3, column 0: nan is no log-probability"),
]


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize(("kind", "nonsense", "words"), NONSENSE, ids=lambda value: getattr(value, "__name__", ""))
def test_nonsense_that_was_written_correctly(tmp_path, monkeypatch, kind, nonsense, words):
    monkeypatch.setattr(sys.modules["kdcache.verify.stored"], "_DEEP_POSITIONS", 5)
    # Ids from 50 on have a rank only where the writer believes that there are more.
    outside = nonsense is a_drawn_id_outside
    source = SyntheticCache(record=KINDS[kind].record, vocab_size=50)
    nonsense(source.targets[5])
    if outside:
        monkeypatch.setattr("kdcache.codecs.targets.encode_samples", with_one_id_more)
    source.write(tmp_path)
    assert verify_cache(str(tmp_path)).ok
    problems = verify_cache(str(tmp_path), deep=True).problems
    [item] = [shard.objects["targets"] for shard in open_cache(str(tmp_path)).manifest.shards if shard.index == 1]
    assert any(words in problem for problem in problems), problems
    assert all(problem.startswith(f"shard 1, field targets, file {item.path}: ") for problem in problems)


def with_one_id_more(samples, num_samples, vocab_size):
    from kdcache.codecs.samples import encode_samples

    return encode_samples(samples, num_samples, vocab_size + 1)


def test_rows_without_a_tail_need_no_draws(tmp_path):
    source = SyntheticCache(3, record=TargetsRecord(kind="hybrid", top_k=2, num_samples=7))
    no_samples(source.targets[1])
    draws_beside_no_tail(source.targets[1])
    source.write(tmp_path)
    assert verify_cache(str(tmp_path), deep=True).problems == []


# ------------------------------------------------------------------------------------------------- other content


def rewrite(path: Path, change, **counts: int) -> None:
    """Replace the targets of shard 0 by changed arrays, with records that agree: only decoding can tell."""
    cache = open_cache(str(path))
    record, shard = cache.manifest.field("targets"), cache.manifest.shards[0]
    arrays = read_arrays(path)
    change(arrays)
    data = pack({array.path: arrays[array.name] for array in record.arrays})
    (path / shard.objects["targets"].path).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["shards"][0]["num_rows"].update(counts)
    manifest["shards"][0]["objects"]["targets"].update(num_bytes=len(data), sha256=layout.sha256(data))
    (path / "manifest.json").write_bytes(layout.canonical_json(manifest))
    (path / "commits" / "000000.json").write_bytes(layout.canonical_json(manifest["shards"][0]))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the targets of shard 0 as any Zarr reader sees them."""
    import zarr

    cache = open_cache(str(path))
    store = zarr.storage.ZipStore(path / cache.manifest.shards[0].objects["targets"].path, mode="r")
    group = zarr.open_group(store, mode="r")
    return {a.name: np.array(group[a.path][:]) for a in cache.manifest.field("targets").arrays}


def one_more(name):
    def change(arrays):
        arrays[name][0] += 1

    return change


def far_too_long(name):
    def change(arrays):
        arrays[name][0] = 250

    return change


def short_table(name):
    def change(arrays):
        arrays[name] = arrays[name][:1]

    return change


CONTRADICTIONS = {
    "num_kept against entries": ("min_prob", one_more("num_kept"), r"topk_\w+ has \d+ entries for rows of \d+"),
    "num_kept above K": ("min_prob", far_too_long("num_kept"), "the longest 250, at most 9"),
    "num_sampled against samples": (
        "sampled",
        one_more("num_sampled"),
        r"sample_counts has \d+ entries for rows of \d+",
    ),
    "num_sampled above N": ("sampled", far_too_long("num_sampled"), "the longest 250, at most 12"),
    "rank outside id_table": ("min_prob", short_table("id_table"), r"a rank is \d+, but id_table has 1 entries"),
    "rank outside sample_table": (
        "sampled",
        short_table("sample_table"),
        r"a rank is \d+, but sample_table has 1 entries",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_arrays_that_contradict_each_other(tmp_path, name):
    kind, change, words = CONTRADICTIONS[name]
    SyntheticCache(record=KINDS[kind].record, codec="compact").write(tmp_path)
    rewrite(tmp_path, change)
    assert verify_cache(str(tmp_path)).ok
    with pytest.raises(
        CorruptCacheError, match=rf"shard 0, field targets, file fields/targets/000000-\w+\.zarr\.zip: .*{words}"
    ):
        open_cache(str(tmp_path)).read([0])
    [problem] = verify_cache(str(tmp_path), deep=True).problems
    assert "shard 0, field targets, file fields/targets/000000" in problem


def test_scales_of_another_width_than_the_states(tmp_path):
    SyntheticCache(record=KINDS["hidden"].record, hidden_codec="int8").write(tmp_path)
    item = open_cache(str(tmp_path)).manifest.shards[0].objects["hidden-2"]
    arrays = open_cache(str(tmp_path))._open_shard(0, ("hidden-2",)).fields["hidden-2"].arrays
    data = pack(
        {
            "positions/states": arrays["states"],
            "positions/token_scale": arrays["token_scale"],
            "table/channel_scale": arrays["channel_scale"][:5],
        }
    )
    (tmp_path / item.path).write_bytes(data)
    change_manifest(tmp_path, set_at("shards", 0, "objects", "hidden-2", "num_bytes", len(data)))
    change_manifest(tmp_path, set_at("shards", 0, "objects", "hidden-2", "sha256", layout.sha256(data)))
    words = r"shard 0, field hidden-2, file fields/hidden-2/000000-\w+\.zarr\.zip: channel_scale has 5 entries for 6"
    with pytest.raises(CorruptCacheError, match=words):
        open_cache(str(tmp_path)).read([0])


@pytest.mark.parametrize(("kind", "count"), [("min_prob", "entries"), ("sampled", "samples")])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_record_with_another_number_of_entries(copy_of, kind, count, change):
    path = copy_of(kind)
    rewrite(path, lambda arrays: None, **{count: open_cache(str(path)).manifest.shards[0].num_rows[count] + change})
    with pytest.raises(
        CorruptCacheError, match=r"shard 0, field targets.*array (entries|samples)/\w+ is .* the manifest"
    ):
        open_cache(str(path)).read([0])


# ------------------------------------------------------------------------------------------------- strangers


def claim(**values):
    def change(manifest):
        manifest["targets"].update(values)

    return change


def without_record(manifest):
    manifest["cache_files"] = []


def without_states(manifest):
    manifest["fields"] = manifest["fields"][:2]
    for shard in manifest["shards"]:
        del shard["objects"]["hidden-2"]


LIES = {
    "entries": ("min_prob", set_at("shards", 0, "num_rows", "entries", 10**12), "more than"),
    "negative entries": ("min_prob", set_at("shards", 0, "num_rows", "entries", -1), "entries"),
    "entries of a cache that has none": ("sampled", set_at("shards", 0, "num_rows", "entries", 1), "more than"),
    "samples": ("sampled", set_at("shards", 0, "num_rows", "samples", 10**12), "more than"),
    "samples of a cache that has none": ("min_prob", set_at("shards", 0, "num_rows", "samples", 1), "more than"),
    "negative samples": ("sampled", set_at("shards", 0, "num_rows", "samples", -1), "samples"),
    "top_k": ("min_prob", claim(top_k=10**12), "targets.top_k is 1000000000000, but there are 50 ids"),
    "num_samples": ("sampled", claim(num_samples=10**12), "has the array"),
    "nothing kept": ("sampled", claim(num_samples=0), "kind sampled cannot have a num_samples of 0"),
    "ids called samples": ("min_prob", claim(kind="sampled"), "kind sampled cannot have a top_k of 9"),
    "ids called ids and samples": ("min_prob", claim(kind="hybrid"), "kind hybrid cannot have a num_samples of 0"),
    "samples called ids": ("hybrid", claim(kind="top-k"), "kind top-k cannot have a num_samples of 7"),
    "ids and samples called samples": ("hybrid", claim(kind="sampled"), "kind sampled cannot have a top_k of 2"),
    "samples called states": ("sampled", claim(kind="hidden"), "kind hidden cannot have a top_k of 0"),
    "a temperature of 0": ("temperatures", claim(temperatures=[0.0, 2.0]), "expected different numbers above 0"),
    "a temperature below 0": ("temperatures", claim(temperatures=[-2.0, 2.0]), "expected different numbers above 0"),
    "a temperature of 1": ("temperatures", claim(temperatures=[1.0, 2.0]), "expected different numbers above 0, not 1"),
    "no temperature": ("temperatures", claim(temperatures=[float("nan"), 2.0]), "expected different numbers above 0"),
    "a temperature twice": ("temperatures", claim(temperatures=[2.0, 2.0]), "expected different numbers above 0"),
    "not ragged": ("min_prob", claim(min_prob=0.0), "has the array"),
    "ragged": ("temperatures", claim(min_prob=0.5), "has the array"),
    "temperatures": ("temperatures", claim(temperatures=[2.0]), "has the array"),
    "another kind": ("min_prob", claim(kind="everything"), "targets.kind"),
    "a probability of 2": ("min_prob", claim(min_prob=2.0), "targets.min_prob"),
    "a prior without a file": ("tail prior", without_record, f"no record of {layout.TAIL_PRIOR}"),
    "a prior that there is not": ("temperatures", claim(tail_prior=True), f"no record of {layout.TAIL_PRIOR}"),
    "no head": ("hidden", without_record, f"no record of {layout.LM_HEAD}"),
    "no states": ("hidden", without_states, "targets of the kind hidden need the field hidden-2"),
    "states that there are not": ("temperatures", claim(kind="hidden"), "need the field hidden-2"),
    "a prior elsewhere": ("tail prior", set_at("cache_files", 0, "path", "../x"), "leads outside the cache"),
    "a size of the head": ("hidden", set_at("cache_files", 0, "num_bytes", 5), "the manifest says 5"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_the_manifest(copy_of, lie, forbid_large_arrays):
    kind, change, words = LIES[lie]
    path = copy_of(kind)
    change_manifest(path, change)
    forbid_large_arrays(200 << 20)
    with pytest.raises(CorruptCacheError) as caught:
        open_cache(str(path)).lm_head_file()
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert verify_cache(str(path), deep=True).problems


def test_a_few_bytes_cannot_ask_for_more_columns_than_there_are_ids(tmp_path, forbid_large_arrays):
    """Samples of one row that decompress from nothing would otherwise make every row as wide."""
    record = TargetsRecord(kind="sampled", top_k=0, num_samples=10**6)
    source = SyntheticCache(record=record, codec="compact")
    source.write(tmp_path)
    first = sum(len(source.masks[n]) for n in range(4))

    def bomb(arrays):
        arrays["num_sampled"][:] = 0
        arrays["num_sampled"][0] = 50 * first
        for name in ("sample_counts", "sample_ranks"):
            arrays[name] = np.zeros(50 * first, arrays[name].dtype)

    rewrite(tmp_path, bomb, samples=50 * first)
    forbid_large_arrays(200 << 20)
    with pytest.raises(CorruptCacheError, match=rf"the longest {50 * first}, at most 50"):
        open_cache(str(tmp_path)).read([0])
