"""Files that a cache has once: the tail prior, which grows with the shards, and the LM head, which is known before."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import CacheWriter, layout, open_cache
from kdcache.cache.shard_file import pack
from kdcache.cache.tail_prior import pack_prior
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.storage.folder import Folder
from kdcache.verify.stored import verify_cache
from tests.cache.test_stranger import change_manifest
from tests.cache.test_writer import content_of, snapshot
from tests.caches import KINDS

SOURCE, HIDDEN = KINDS["tail prior"], KINDS["hidden"]
PRIOR, HEAD = "tail_prior.zarr.zip", "lm_head.safetensors"
FETCH = "shards do not hold what they add to it: fetch the file again, or dump into another output"


class Killed(BaseException):
    """Stands for a process that ends here."""


def killed_at(monkeypatch, path: Path, name: str, source=SOURCE) -> None:
    """Write ``source`` until the file ``name`` is to be written."""
    real = Folder.write

    def write(folder: Folder, target: str, data: bytes) -> None:
        if target == name:
            raise Killed
        real(folder, target, data)

    monkeypatch.setattr(Folder, "write", write)
    with pytest.raises(Killed):
        source.write(path)
    monkeypatch.undo()


def test_it_is_the_mean_over_all_positions(written):
    found = open_cache(str(written("tail prior"))).tail_prior_V
    expected = sum(item.sum_V for item in SOURCE.tail_sums) / sum(item.num_positions for item in SOURCE.tail_sums)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert open_cache(str(written("sampled"))).tail_prior_V is None


@pytest.mark.parametrize("shard", range(4))
@pytest.mark.parametrize("file", ["prior", "commit"])
def test_a_killed_writer_goes_on_to_the_same_bytes(written, tmp_path, monkeypatch, shard, file):
    if file == "commit":  # the share of the shard is in the prior already, and the shard is made again
        killed_at(monkeypatch, tmp_path, layout.commit_name(shard))
    else:
        SOURCE.write(tmp_path, shards=range(shard), finish=False)
        killed_at(monkeypatch, tmp_path, PRIOR)
    SOURCE.write(tmp_path)
    assert (tmp_path / PRIOR).read_bytes() == (written("tail prior") / PRIOR).read_bytes()
    assert content_of(tmp_path) == content_of(written("tail prior"))
    assert verify_cache(str(tmp_path), deep=True).problems == []


def test_a_shard_that_is_made_again_adds_nothing(copy_of):
    path = copy_of("tail prior")
    before = (path / PRIOR).read_bytes()
    (path / "commits" / "000002.json").unlink()
    SOURCE.write(path)
    assert (path / PRIOR).read_bytes() == before
    assert verify_cache(str(path), deep=True).problems == []


def test_a_prior_without_shards_is_begun_anew(written, tmp_path, monkeypatch):
    killed_at(monkeypatch, tmp_path, layout.commit_name(0))
    (tmp_path / PRIOR).write_bytes(b"half")
    SOURCE.write(tmp_path)
    assert (tmp_path / PRIOR).read_bytes() == (written("tail prior") / PRIOR).read_bytes()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", ["missing", "cut short", "older"])
def test_a_lost_prior_stops_the_writer(tmp_path, finished, damage):
    SOURCE.write(tmp_path, shards=range(1), finish=False)
    older = (tmp_path / PRIOR).read_bytes()
    SOURCE.write(tmp_path, shards=None if finished else range(3), finish=finished)
    if damage == "missing":
        (tmp_path / PRIOR).unlink()
    else:
        (tmp_path / PRIOR).write_bytes(older if damage == "older" else older[:-20])
    before = snapshot(tmp_path)
    words = {"missing": "is missing", "cut short": "is not a readable zip", "older": r"lacks the share of \d committed"}
    with pytest.raises(CacheError, match=rf"{PRIOR}.* {words[damage]}.*{FETCH}"):
        SOURCE.write(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("at", [0, 3])
def test_a_shard_without_its_share_is_refused(tmp_path, at):
    source = type(SOURCE)(record=SOURCE.record)
    source.tail_sums[source.starts[at]] = None
    with pytest.raises(CacheError, match=f"shard {at} has no share of the tail prior, which the plan stores"):
        source.write(tmp_path)
    assert not (tmp_path / layout.commit_name(at)).exists()


def probabilities(shards: dict[int, int], **changes: float) -> bytes:
    values = np.full(changes.get("size", 50), changes.get("value", 0.01), np.float32)
    return pack_prior(values, shards)


def pack_twice() -> bytes:
    """A prior that counts every shard twice."""
    numbers = np.array([0, 1, 2, 3] * 2)
    return pack(
        {
            "table/probability": np.full(50, 0.01, np.float32),
            "table/shards": numbers.astype(np.int32),
            "table/num_positions": numbers.astype(np.int64),
        }
    )


SHARDS = {0: 1, 1: 1, 2: 1, 3: 1}
WRONG = {
    "another vocabulary": (probabilities(SHARDS, size=49), "these are not 50 probabilities"),
    "more than 1": (probabilities(SHARDS, value=0.03), "these are not 50 probabilities whose sum is at most 1"),
    "negative": (probabilities(SHARDS, value=-0.001), "these are not 50 probabilities"),
    "not a number": (probabilities(SHARDS, value=np.nan), "these are not 50 probabilities"),
    "a shard short": (probabilities({0: 1, 1: 1, 3: 1}), "mean over shards 0, 1, 3; expected all from 0 to 3"),
    "a shard too many": (probabilities({**SHARDS, 4: 1}), "mean over shards 0, 1, 2, 3, 4; expected"),
    "other rows": (probabilities(SHARDS), "it counts 1 positions of shard 0, the manifest"),
    "a shard twice": (pack_twice(), "8 shards, but"),
    "no zip": (b"x" * 400, "is not a readable zip"),
    "another array": (pack({"table/probability": np.zeros(50, np.float64)}), "array table/probability is float64"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_prior_that_is_none(copy_of, wrong):
    path, (data, words) = copy_of("tail prior"), WRONG[wrong]
    (path / PRIOR).write_bytes(data)
    with pytest.raises(CorruptCacheError, match=rf"{PRIOR} (has \d+ bytes, the manifest says|is damaged \(its sha256)"):
        _ = open_cache(str(path)).tail_prior_V
    # Even where a stranger's manifest agrees with the file.
    change_manifest(path, lambda m: m["cache_files"][0].update(num_bytes=len(data), sha256=layout.sha256(data)))
    with pytest.raises(CorruptCacheError, match=f"{PRIOR}.*{words}"):
        _ = open_cache(str(path)).tail_prior_V
    [problem] = verify_cache(str(path)).problems
    assert PRIOR in problem
    assert words in problem


@pytest.mark.parametrize(("kind", "name"), [("tail prior", PRIOR), ("hidden", HEAD)])
@pytest.mark.parametrize("damage", ["missing", "cut short", "flipped", "longer"])
def test_verify_finds_damage_of_both(copy_of, kind, name, damage):
    path = copy_of(kind)
    data = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
        found = verify_cache(str(path)).problems
        assert len(found) == 1
        assert name in found[0]
        return
    for byte in np.linspace(0, len(data) - 1, 20 if damage == "flipped" else 1).astype(int).tolist():
        flipped = data[:byte] + bytes([data[byte] ^ 4]) + data[byte + 1 :]
        (path / name).write_bytes({"cut short": data[:-1], "longer": data + b"\0", "flipped": flipped}[damage])
        [problem] = verify_cache(str(path)).problems
        assert name in problem, byte


# ------------------------------------------------------------------------------------------------------ LM head


@pytest.mark.parametrize("damage", ["missing", "damaged"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_lost_head_is_written_again(tmp_path, damage, finished):
    HIDDEN.write(tmp_path, shards=None if finished else range(2), finish=finished)
    good = (tmp_path / HEAD).read_bytes()
    if damage == "missing":
        (tmp_path / HEAD).unlink()
    else:
        (tmp_path / HEAD).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    if finished:
        report = verify_cache(str(tmp_path))
        assert (len(report.problems), report.num_rewritable) == (1, 1)
        with pytest.raises(CorruptCacheError, match=f"{HEAD}"):
            open_cache(str(tmp_path)).lm_head_file()
    manifest = (tmp_path / "manifest.json").read_bytes() if finished else None
    HIDDEN.write(tmp_path)
    assert (tmp_path / HEAD).read_bytes() == good
    assert manifest in (None, (tmp_path / "manifest.json").read_bytes())
    assert verify_cache(str(tmp_path), deep=True).problems == []


def test_another_head_never_becomes_the_recorded_one(copy_of, caplog):
    path = copy_of("hidden")
    manifest = (path / "manifest.json").read_bytes()
    (path / HEAD).write_bytes(b"damaged")
    with CacheWriter(Folder(str(path))) as writer:
        assert (
            writer.begin(HIDDEN.plan(), HIDDEN.table(), {"tokenizer.json": b'{"version": "1.0"}'}, {HEAD: b"other"})
            == []
        )
        writer.finalise()
    assert f"{HEAD} is damaged, and other versions of the libraries made it" in caplog.text
    assert (path / HEAD).read_bytes() == b"damaged"
    assert (path / "manifest.json").read_bytes() == manifest
    assert not verify_cache(str(path)).ok


def test_a_cache_without_its_head_is_not_finished(tmp_path):
    HIDDEN.write(tmp_path, finish=False)
    (tmp_path / HEAD).unlink()
    with CacheWriter(Folder(str(tmp_path))) as writer:
        assert writer.begin(HIDDEN.plan(), HIDDEN.table(), {}, {}) == []
        with pytest.raises(CacheError, match=f"cannot be finished: {HEAD} is missing"):
            writer.finalise()


# ------------------------------------------------------------------------------------ beginnings of other caches


def test_a_start_that_was_cut_short_after_the_head_begins_again(tmp_path, monkeypatch):
    killed_at(monkeypatch, tmp_path, "plan.parquet", HIDDEN)
    assert (tmp_path / HEAD).exists()
    assert not (tmp_path / "plan.json").exists()
    KINDS["sampled"].write(tmp_path)
    assert not (tmp_path / HEAD).exists()
    assert verify_cache(str(tmp_path), deep=True).problems == []


@pytest.mark.parametrize("last", ["first shard", "prior", "commit"])
def test_a_dump_without_a_shard_gives_way_to_another(tmp_path, monkeypatch, last):
    """Objects, head and prior of a dump that was killed in its first shard are not somebody else's files."""
    if last == "first shard":
        killed_at(monkeypatch, tmp_path, layout.commit_name(0), HIDDEN)
        assert list((tmp_path / "fields" / "hidden-2").iterdir())
    else:
        killed_at(monkeypatch, tmp_path, PRIOR if last == "prior" else layout.commit_name(0))
    if last == "commit":  # in the middle of that write
        (tmp_path / "commits").mkdir()
        (tmp_path / "commits" / "000000.json.1234.tmp").write_text("{")
    other = KINDS["min_prob"]
    other.write(tmp_path)
    assert verify_cache(str(tmp_path), deep=True).problems == []
    records = [record.path for shard in open_cache(str(tmp_path)).manifest.shards for record in shard.objects.values()]
    beside = {"manifest.json", "plan.json", "plan.parquet", "tokenizer/tokenizer.json"}
    commits = {layout.commit_name(shard) for shard in range(4)}
    assert set(snapshot(tmp_path)) == {*records, *commits, *beside}


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "plan.parquet", "plan.json"])
@pytest.mark.parametrize("then", ["old", "new"])
def test_whoever_comes_after_a_kill_while_one_gives_way_can_go_on(tmp_path, monkeypatch, name, then):
    old, new = HIDDEN, KINDS["min_prob"]
    killed_at(monkeypatch, tmp_path, layout.commit_name(0), old)
    killed_at(monkeypatch, tmp_path, name, new)
    chosen = old if then == "old" else new
    chosen.write(tmp_path)
    chosen.write(tmp_path.parent / "fresh")
    assert content_of(tmp_path) == content_of(tmp_path.parent / "fresh")
    assert verify_cache(str(tmp_path), deep=True).problems == []
    shutil.rmtree(tmp_path.parent / "fresh")
