"""Whole caches from whole caches, without a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from kdcache.cache import Cache, CacheWriter, open_cache
from kdcache.config import build
from kdcache.errors import CacheError, ConfigError, CorruptCacheError, IncompleteCacheError
from kdcache.schema import TargetsRecord
from kdcache.transcode import TranscodeConfig, TranscodeResult, preview_transcoding, transcode_cache
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import content_of, snapshot
from tests.dump.fake import BigramTeacher, run_dump
from tests.synthetic import SyntheticCache
from tests.transcode.test_cut import compare

RICH = TargetsRecord(top_k=12, temperatures=(0.5, 2.0), tail_prior=True)


def config_for(source: Path | str, output: Path | str, **changes: Any) -> TranscodeConfig:
    return build(TranscodeConfig, {"source": str(source), "output": str(output), **changes})


def transcode(source: Path | str, output: Path | str, **changes: Any) -> TranscodeResult:
    return transcode_cache(config_for(source, output, **changes), progress=False)


def opened(path: Path | str) -> Cache:
    assert verify_cache(str(path), deep=True).problems == []
    return open_cache(str(path))


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """Kept ids with everything: packed, two layers, tails at temperatures, a prior."""
    source = SyntheticCache(
        40, record=RICH, packed=True, hidden=("hidden-1", "hidden-2"), hidden_codec="int8", shard_sequences=7
    )
    source.write(tmp_path_factory.mktemp("rich") / "cache")
    return tmp_path_factory.getbasetemp() / "rich0" / "cache"


# ------------------------------------------------------------------------------ equal to a dump of those settings


@pytest.mark.parametrize("codec", ["exact", "compact", "fp16"])
@pytest.mark.parametrize(
    "targets",
    [
        {"top_k": 3},
        {"top_k": 8, "min_prob": 0.01},
        {"min_mass": 0.8},
        {"top_k": 5, "temperatures": [2.0]},
        {"top_k": 5, "tail_prior": False},
    ],
    ids=str,
)
def test_equal_to_a_dump(tmp_path, corpus_file, targets, codec):
    held = {"top_k": 12, "codec": "exact", "temperatures": [0.5, 2.0], "tail_prior": True}
    run_dump(corpus_file, tmp_path / "source", BigramTeacher(), targets=held)
    run_dump(corpus_file, tmp_path / "dumped", BigramTeacher(), targets={**held, **targets, "codec": codec})
    result = transcode(tmp_path / "source", tmp_path / "made", targets={**targets, "codec": codec})
    made, dumped = opened(tmp_path / "made"), opened(tmp_path / "dumped")
    assert result.manifest.targets == dumped.manifest.targets
    assert made.manifest.fields == dumped.manifest.fields
    everything = range(len(made))
    if codec == "exact":
        compare(made.read(everything).targets, dumped.read(everything).targets, atol=1e-5)
    for name in ("num_positions", "teacher_loss_sum", "entropy_sum", "kept_mass_sum", "top1_correct"):
        found, expected = (getattr(c.manifest.statistics, name) for c in (made, dumped))
        assert found == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(made.shard_starts, dumped.shard_starts)
    if made.tail_prior_V is not None:
        np.testing.assert_allclose(made.tail_prior_V, dumped.tail_prior_V, atol=1e-6)
    assert made.sequence_table().drop_columns(["teacher_loss", "teacher_entropy", "kept_mass"]) == (
        dumped.sequence_table().drop_columns(["teacher_loss", "teacher_entropy", "kept_mass"])
    )
    plans = [pq.read_table(tmp_path / name / "plan.parquet") for name in ("made", "dumped")]
    assert plans[0].equals(plans[1])


def test_the_tail_identity_of_two_steps(tmp_path, rich):
    transcode(rich, tmp_path / "8", targets={"top_k": 8})
    transcode(tmp_path / "8", tmp_path / "3", targets={"top_k": 3})
    transcode(rich, tmp_path / "direct", targets={"top_k": 3})
    steps, direct = opened(tmp_path / "3"), opened(tmp_path / "direct")
    compare(steps.read(range(40)).targets, direct.read(range(40)).targets)
    np.testing.assert_allclose(steps.tail_prior_V, direct.tail_prior_V, atol=1e-6)


@pytest.mark.parametrize("vector_codec", ["exact", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("codec", ["exact", "compact", "bf16", "fp16"])
def test_a_copy_has_the_same_content(tmp_path, codec, vector_codec):
    source = SyntheticCache(record=RICH, packed=True, hidden=("hidden-1",), codec=codec, hidden_codec=vector_codec)
    source.write(tmp_path / "source")
    transcode(tmp_path / "source", tmp_path / "copy")
    before, after = opened(tmp_path / "source"), opened(tmp_path / "copy")
    content = [{k: v for k, v in content_of(p.folder.url).items() if k[1] != "sequences"} for p in (before, after)]
    assert content[0] == content[1]
    np.testing.assert_allclose(before.tail_prior_V, after.tail_prior_V, atol=1e-7)
    assert before.manifest.tokenizer_files == after.manifest.tokenizer_files


@pytest.mark.parametrize("kind", ["sampled", "hybrid"])
def test_draws_change_their_codec_and_nothing_else(tmp_path, kind):
    record = TargetsRecord(kind=kind, top_k=3 if kind == "hybrid" else 0, num_samples=11)
    SyntheticCache(record=record, hidden=("hidden-1",)).write(tmp_path / "source")
    changes = {"targets": {"codec": "compact"}, "hidden_states": {"layers": []}, "where": "num_positions >= 3"}
    transcode(tmp_path / "source", tmp_path / "made", **changes)
    source, made = opened(tmp_path / "source"), opened(tmp_path / "made")
    chosen = np.flatnonzero(source.lengths_N >= 3)
    before, after = source.read(chosen).targets, made.read(range(len(made))).targets
    for ids_before, counts_before, ids, counts in zip(
        before.samples.ids_PJ, before.samples.counts_PJ, after.samples.ids_PJ, after.samples.counts_PJ, strict=True
    ):
        drawn = [dict(zip(i[c > 0], c[c > 0], strict=True)) for i, c in ((ids_before, counts_before), (ids, counts))]
        assert drawn[0] == drawn[1]
    assert made.manifest.hidden_layers == ()


def test_a_coarser_grid(tmp_path, rich):
    transcode(rich, tmp_path / "16", targets={"codec": "compact"})
    transcode(tmp_path / "16", tmp_path / "8", targets={"codec": {"grid": 8}})
    assert opened(tmp_path / "8").manifest.field("targets").codec["grid"] == 8
    transcode(tmp_path / "8", tmp_path / "3", targets={"top_k": 3})  # what is not given stays
    assert opened(tmp_path / "3").manifest.field("targets").codec["grid"] == 8


# ------------------------------------------------------------------------------------------------- hidden states


def test_hidden_states_are_dropped_and_chosen(tmp_path, rich):
    for name, layers, stays in (
        ("none", [], ()),
        ("last", "last", ("hidden-2",)),
        ("one", [1], ("hidden-1",)),
        ("end", "-1,-2", ("hidden-1", "hidden-2")),
    ):
        transcode(rich, tmp_path / name, hidden_states={"layers": layers})
        assert opened(tmp_path / name).manifest.hidden_layers == stays
        assert sorted(p.name for p in (tmp_path / name / "fields").glob("*")) == sorted(("tokens", "targets", *stays))
    with pytest.raises(ConfigError, match="holds no hidden-0; its hidden states are hidden-1, hidden-2"):
        transcode(rich, tmp_path / "x", hidden_states={"layers": [0, 1]})
    with pytest.raises(ConfigError, match="by layer number or 'last', found 'lst'"):
        transcode(rich, tmp_path / "x", hidden_states={"layers": "lst"})


def test_the_error_of_hidden_states_adds_up(tmp_path):
    SyntheticCache(30, hidden=("hidden-1",), hidden_codec="exact", shard_sequences=30).write(tmp_path / "exact")
    states = open_cache(str(tmp_path / "exact")).read(range(30), fields=["hidden-1"]).hidden["hidden-1"]
    at, errors = "exact", []
    for name in ("bf16", "int8", "fp16"):
        transcode(tmp_path / at, tmp_path / name, hidden_states={"codec": name})
        cache = opened(tmp_path / name)
        found = cache.read(range(30), fields=["hidden-1"]).hidden["hidden-1"]
        rows = np.linalg.norm(found - states, axis=1) / np.linalg.norm(states, axis=1)
        recorded = cache.manifest.field("hidden-1").relative_error
        assert recorded == pytest.approx(np.sqrt((rows**2).mean()), rel=0.1)
        errors.append(recorded)
        at = name
    assert errors == sorted(errors)
    transcode(tmp_path / "int8", tmp_path / "copy")
    assert open_cache(str(tmp_path / "copy")).manifest.field("hidden-1").relative_error == errors[1]
    transcode(tmp_path / "int8", tmp_path / "some", where="num_positions > 3")  # scales are made anew
    assert open_cache(str(tmp_path / "some")).manifest.field("hidden-1").relative_error > errors[1]


def test_an_unknown_error_stays_unknown(tmp_path):
    SyntheticCache(hidden=("hidden-1",), hidden_codec="bf16").write(tmp_path / "source")
    transcode(tmp_path / "source", tmp_path / "made", hidden_states={"codec": "int8"})
    assert open_cache(str(tmp_path / "made")).manifest.field("hidden-1").relative_error is None


# ----------------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize(("where", "limit"), [("num_positions % 2 == 0 and teacher_loss < 8", None), (None, 11)])
def test_some_sequences(tmp_path, rich, where, limit):
    transcode(rich, tmp_path, where=where, limit_sequences=limit, targets={"top_k": 6})
    source, made = opened(rich), opened(tmp_path)
    table = source.sequence_table()
    lengths, losses = np.asarray(table["num_positions"]), np.asarray(table["teacher_loss"])
    chosen = np.flatnonzero((lengths % 2 == 0) & (losses < 8)) if where else np.arange(11)
    assert 3 < len(made) == len(chosen) < 40
    before, after = (c.read(n, fields=["hidden-1"]) for c, n in ((source, chosen), (made, range(len(made)))))
    for name in ("tokens_T", "segment_ids_T", "loss_mask_P", "position_offsets_N1"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name), err_msg=name)
    np.testing.assert_array_equal(before.targets.ids_PK[:, :6], after.targets.ids_PK)
    np.testing.assert_allclose(before.hidden["hidden-1"], after.hidden["hidden-1"], atol=0.05)
    rows = made.sequence_table()
    assert rows["sequence"].to_pylist() == list(range(len(chosen)))
    assert rows["document_id"].to_pylist() == [f"document {n}" for n in chosen]
    plan = pq.read_table(tmp_path / "plan.parquet")
    assert plan["sequence"].to_pylist() == list(range(len(chosen)))
    assert plan["document_id"].to_pylist() == rows["document_id"].to_pylist()
    np.testing.assert_array_equal(made.shard_starts[np.asarray(plan["shard"])] <= plan["sequence"], True)
    assert made.manifest.num_shards == len(chosen)  # the source says that a shard has one position or more


def test_filtered_shards_have_the_usual_size(tmp_path, corpus_file):
    run_dump(corpus_file, tmp_path / "source", BigramTeacher(), shard_positions=60)
    transcode(tmp_path / "source", tmp_path / "made", where="num_positions > 5")
    made = opened(tmp_path / "made")
    sizes = [shard.num_positions for shard in made.manifest.shards]
    assert len(sizes) > 2
    assert all(60 <= size < 60 + 16 for size in sizes[:-1])
    assert made.manifest.shard_positions == 60


def test_a_filter_that_chooses_all_changes_nothing(tmp_path, rich):
    transcode(rich, tmp_path, where="num_positions > 0", limit_sequences=1000)
    np.testing.assert_array_equal(open_cache(str(tmp_path)).shard_starts, open_cache(str(rich)).shard_starts)


def test_the_prior_of_some_sequences_is_that_of_all(tmp_path, rich):
    transcode(rich, tmp_path, where="num_positions > 3")
    np.testing.assert_allclose(opened(tmp_path).tail_prior_V, open_cache(str(rich)).tail_prior_V, atol=1e-7)


# ------------------------------------------------------------------------------------------ resuming, provenance


def test_resumed_after_an_error(tmp_path, rich, monkeypatch):
    changes = {"targets": {"top_k": 4, "codec": "compact"}, "where": "num_positions > 2"}
    transcode(rich, tmp_path / "whole", **changes)
    real, calls = CacheWriter.write_shard, []

    def fail(self, data):
        calls.append(data.index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, data)

    monkeypatch.setattr(CacheWriter, "write_shard", fail)
    with pytest.raises(KeyboardInterrupt):
        transcode(rich, tmp_path / "made", **changes)
    monkeypatch.undo()
    with pytest.raises(IncompleteCacheError, match="3 of"):
        open_cache(str(tmp_path / "made"))
    result = transcode(rich, tmp_path / "made", **changes)
    assert result.num_shards_written == result.manifest.num_shards - 3
    opened(tmp_path / "made")
    assert content_of(tmp_path / "made") == content_of(tmp_path / "whole")
    priors = [(tmp_path / name / "tail_prior.zarr.zip").read_bytes() for name in ("made", "whole")]
    assert priors[0] == priors[1]
    before = snapshot(tmp_path / "made")
    assert transcode(rich, tmp_path / "made", **changes).num_shards_written == 0
    assert snapshot(tmp_path / "made") == before


KILLED = """
import sys
from tests.dump.crash_server import kill_in_write
from tests.transcode.test_transcode import transcode
kill_in_write(int(sys.argv[3]))
transcode(sys.argv[1], sys.argv[2], targets={"top_k": 4})
"""


def test_killed_in_the_middle_of_writes(tmp_path, rich, preloaded):
    transcode(rich, tmp_path / "whole", targets={"top_k": 4})
    for number in (2, 5, 9):  # before the plan, in the first shard, in a later one
        command = [preloaded, "-c", KILLED, str(rich), str(tmp_path / "made"), str(number)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        killed = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=60)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    transcode(rich, tmp_path / "made", targets={"top_k": 4})
    opened(tmp_path / "made")
    assert content_of(tmp_path / "made") == content_of(tmp_path / "whole")


def test_another_transcoding_is_refused(tmp_path, rich):
    SyntheticCache(40, record=RICH, packed=True, hidden=("hidden-1", "hidden-2"), seed=1).write(tmp_path / "other")
    made = tmp_path / "made"
    transcode(rich, made, limit_sequences=6)
    for changes in ({"targets": {"top_k": 5}, "limit_sequences": 6}, {"limit_sequences": 7}, {}):
        with pytest.raises(CacheError, match="holds another cache"):
            transcode(rich, made, **changes)
        with pytest.raises(CacheError, match="holds another cache"):
            preview_transcoding(config_for(rich, made, **changes))
    # Equal plans of other sequences: of six of the same lengths, or of another source.
    for run in (transcode, lambda *a, **k: preview_transcoding(config_for(*a, **k))):
        with pytest.raises(CacheError, match=r"begun from another source or with another filter: .* limit 6 there"):
            run(rich, made, where="sequence < 6")
    shutil.copytree(rich, tmp_path / "moved")
    assert transcode(tmp_path / "moved", made, limit_sequences=6).num_shards_written == 0


def test_an_output_without_a_shard_takes_another_filter(tmp_path, rich, monkeypatch):
    def fail(self, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(CacheWriter, "write_shard", fail)
    with pytest.raises(KeyboardInterrupt):
        transcode(rich, tmp_path, where="sequence < 6")
    monkeypatch.undo()
    transcode(rich, tmp_path, limit_sequences=6)
    assert opened(tmp_path).manifest.provenance["transcoded"][0]["settings"]["limit_sequences"] == 6


def test_the_chain_of_provenance(tmp_path, rich):
    transcode(rich, tmp_path / "a", targets={"top_k": 8})
    transcode(tmp_path / "a", tmp_path / "b", where="num_positions > 2", hidden_states={"layers": []})
    first, second = open_cache(str(tmp_path / "b")).manifest.provenance["transcoded"]
    assert first["source"] == open_cache(str(rich)).fingerprint
    assert first["settings"]["targets"] == {"top_k": 8}
    assert second["source"] == open_cache(str(tmp_path / "a")).fingerprint
    assert second["settings"]["where"] == "num_positions > 2"
    assert second["settings"]["hidden_states"] == {"layers": []}
    assert second["kdcache"]
    assert second["created"]
    before, after = (open_cache(str(p)).manifest for p in (rich, tmp_path / "b"))
    for name in ("teacher", "tokenizer", "corpus", "sequences", "task"):
        assert getattr(before, name) == getattr(after, name)
    assert after.provenance["versions"] == before.provenance["versions"]
    for path in (tmp_path / "b").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_strange_provenance_is_no_obstacle(tmp_path):
    source = SyntheticCache()
    plan = source.plan(provenance={"transcoded": "yes", "created": 3})
    source.plan = lambda **changes: plan
    source.write(tmp_path / "source")
    transcode(tmp_path / "source", tmp_path / "made")
    assert len(open_cache(str(tmp_path / "made")).manifest.provenance["transcoded"]) == 1


# ------------------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_writes_nothing_and_tells_the_truth(tmp_path, corpus_file):
    run_dump(corpus_file, tmp_path / "source", BigramTeacher(), layers=(1,), shard_positions=2000)
    config = config_for(tmp_path / "source", tmp_path / "made", targets={"top_k": 3, "codec": "compact"})
    estimate = preview_transcoding(config)
    assert not (tmp_path / "made").exists()
    manifest = transcode_cache(config, progress=False).manifest
    for name in ("num_sequences", "num_positions", "num_shards"):
        assert getattr(estimate, name) == getattr(manifest, name)
    assert estimate.bytes_per_token == pytest.approx(manifest.bytes_per_token, rel=0.1)
    assert estimate.source_bytes_per_token == open_cache(str(tmp_path / "source")).manifest.bytes_per_token
    sums = manifest.statistics
    assert estimate.kept_mass == pytest.approx(sums.kept_mass_sum / sums.num_positions, rel=0.05)
    assert preview_transcoding(config).num_shards_committed == manifest.num_shards
    json.dumps(estimate.to_dict())


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": {"top_k": 13}}, "cannot become this: top_k 13 is more than the 12 ids that it keeps"),
        ({"targets": {"kind": "sampled"}}, "targets of the kind top-k, and only those of the kind hidden can become"),
        ({"targets": {"kind": "hidden"}}, "only those of the kind hidden can become hidden"),
        ({"targets": {"kind": "top"}}, "targets: 'kind'"),
        ({"targets": {"topk": 3}}, "unknown setting 'topk'; did you mean 'top_k'"),
        ({"targets": {"temperatures": [3.0, 2.0]}}, "no tails at temperature 3, but at 0.5, 2"),
        ({"targets": {"codec": "compct"}}, "unknown codec 'compct'; did you mean 'compact'"),
        ({"targets": {"codec": {"grid": 8}}}, "codec exact: unknown setting 'grid'"),
        ({"targets": {"codec": 3}}, "expected a codec's name"),
        ({"targets": {"num_samples": 3}}, "take no samples"),
        ({"where": "teacher_los < 3"}, "did you mean 'teacher_loss'"),
        ({"where": "__import__('os').getcwd() == 'x'"}, "which is not allowed; a filter may contain"),
        ({"where": "num_positions > 99"}, "selects none of the 40 sequences"),
    ],
    ids=str,
)
def test_what_cannot_be(tmp_path, rich, changes, words):
    for run in (
        lambda: transcode(rich, tmp_path / "x", **changes),
        lambda: preview_transcoding(config_for(rich, tmp_path / "x", **changes)),
    ):
        with pytest.raises(ConfigError, match=words):
            run()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("held", "wanted", "words"),
    [
        ({"top_k": 4}, {"tail_prior": True}, "it holds no tail prior"),
        ({"top_k": 4}, {"temperatures": 2}, "no tails at temperature 2, but at no temperature but 1"),
        ({"top_k": 4, "min_prob": 0.01}, {"min_prob": 0}, "min_prob 0 is below 0.01, under which it keeps no ids"),
        ({"top_k": 4, "min_mass": 0.8}, {"min_mass": 0.9}, "min_mass 0.9 is above 0.8"),
        (
            {"kind": "sampled", "top_k": 0, "num_samples": 5},
            {"num_samples": 3},
            "num_samples 5 to 3 would be other samples",
        ),
        ({"kind": "hybrid", "top_k": 3, "num_samples": 5}, {"top_k": 2}, "top_k 3 to 2 .*what can change is the codec"),
        ({"kind": "sampled", "top_k": 0, "num_samples": 5}, {"seed": 1}, "seed 0 to 1 would be other samples"),
    ],
    ids=str,
)
def test_what_the_source_does_not_hold(tmp_path, held, wanted, words):
    SyntheticCache(record=TargetsRecord(**held)).write(tmp_path / "source")
    with pytest.raises(ConfigError, match=words):
        transcode(tmp_path / "source", tmp_path / "made", targets=wanted)


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    source = tmp_path / "folder" / "source"
    SyntheticCache().write(source)
    before = snapshot(source)
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for output, words in (
        (source, "is the source itself"),
        ("folder/../folder/source", "is the source itself"),
        ("link", "is the source itself"),
        (source / "inside" / "deep", "lies inside the source"),
        ("link/inside", "lies inside the source"),
        (tmp_path / "folder", "holds the source"),
    ):
        with pytest.raises(ConfigError, match=words):
            transcode(source, output)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("mine")
    with pytest.raises(CacheError, match="is not empty and holds no cache"):
        transcode(source, "foreign")
    with pytest.raises(CacheError, match="there is no cache in"):
        transcode(tmp_path / "nothing", tmp_path / "made")
    assert snapshot(source) == before
    assert not (tmp_path / "made").exists()


def test_an_unfinished_source(tmp_path):
    SyntheticCache().write(tmp_path / "source", shards=range(1), finish=False)
    with pytest.raises(IncompleteCacheError, match="is unfinished: 1 of 4 shards are written"):
        transcode(tmp_path / "source", tmp_path / "made")


@pytest.mark.parametrize("name", ["plan.parquet", "tokenizer/tokenizer.json", "tail_prior.zarr.zip", "fields/targets"])
def test_a_damaged_source(tmp_path, rich, name):
    source = Path(shutil.copytree(rich, tmp_path / "source"))
    path = source / name if name != "fields/targets" else sorted((source / name).iterdir())[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=name.split("/")[-1].split(".")[0]):
        transcode(source, tmp_path / "made")


def test_what_is_written_is_checked(tmp_path, rich, monkeypatch):
    real = CacheWriter.finalise

    def damage(self):
        manifest = real(self)
        path = self.folder.local_path / manifest.shards[0].objects["targets"].path
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        return manifest

    monkeypatch.setattr(CacheWriter, "finalise", damage)
    with pytest.raises(CorruptCacheError, match="is not what was written: shard 0, field targets"):
        transcode(rich, tmp_path / "made")
    result = transcode_cache(config_for(rich, tmp_path / "other"), check=False, progress=False)
    assert not result.verified


def test_a_second_process_is_refused(tmp_path, rich):
    from kdcache.storage.folder import Folder

    with CacheWriter(Folder(str(tmp_path))), pytest.raises(CacheError, match="another process is writing"):
        transcode(rich, tmp_path)


def test_remote_places(rich):
    source = open_cache(str(rich))
    transcode(rich, "memory://transcoded/a", targets={"top_k": 5})
    transcode("memory://transcoded/a", "memory://transcoded/b", where="num_positions > 2")
    assert 0 < len(open_cache("memory://transcoded/b")) < len(source)
    with pytest.raises(ConfigError, match="lies inside the source"):
        transcode("memory://transcoded/a", "memory://transcoded/a/b")
