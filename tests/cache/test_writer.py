from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.cache import CacheWriter, open_cache
from kdcache.errors import CacheError, IncompleteCacheError
from kdcache.schema import ImportIdentity, TeacherRecord
from kdcache.storage.folder import Folder
from kdcache.verify.stored import verify_cache
from tests.caches import SOURCE
from tests.synthetic import SyntheticCache


def content_of(path: Path | str) -> dict[tuple[int, str], str]:
    """SHA-256 of every object by shard and field: what must not depend on how a cache came about."""
    manifest = open_cache(str(path)).manifest
    return {(s.index, field): o.sha256 for s in manifest.shards for field, o in s.objects.items()}


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_shards_in_any_order_give_the_same_content(sound, tmp_path):
    for shard in (2, 0, 1):
        SOURCE.write(tmp_path, shards=range(shard, shard + 1), finish=shard == 1)
    assert content_of(tmp_path) == content_of(sound)
    assert verify_cache(str(tmp_path), deep=True).ok


def test_a_finished_cache_is_left_as_it_is(copy):
    before = snapshot(copy)
    SOURCE.write(copy)
    assert snapshot(copy) == before


def test_a_deleted_manifest_is_written_again_byte_by_byte(copy):
    before = snapshot(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(IncompleteCacheError, match="3 of 3 shards are written"):
        open_cache(str(copy))
    SOURCE.write(copy)
    assert snapshot(copy) == before


@pytest.mark.parametrize("damage", ["missing object", "short object", "missing record", "garbled record", "swapped"])
def test_only_the_damaged_shard_is_made_again(copy, damage, caplog):
    before, content = snapshot(copy), content_of(copy)
    record = copy / "commits" / "000001.json"
    [item] = (copy / "fields" / "hidden-2").glob("000001-*")
    if damage == "missing object":
        item.unlink()
    elif damage == "short object":
        item.write_bytes(item.read_bytes()[:-1])
    elif damage == "missing record":
        record.unlink()
    elif damage == "garbled record":
        record.write_text("{")
    else:
        record.write_bytes((copy / "commits" / "000000.json").read_bytes())
    with CacheWriter(Folder(str(copy))) as writer:
        missing = writer.begin(SOURCE.plan(), SOURCE.table(), {})
    assert missing == [1]
    with pytest.raises(IncompleteCacheError):  # no manifest may promise what is not there
        open_cache(str(copy))
    SOURCE.write(copy)
    after = snapshot(copy)
    untouched = {name for name in before if "000001" not in name and name != "manifest.json"}
    assert {name: after.get(name) for name in untouched} == {name: before[name] for name in untouched}
    assert content_of(copy) == content
    assert len(after) == len(before)  # the first attempt's objects were removed
    assert verify_cache(str(copy), deep=True).ok


def test_finishing_refuses_holes(tmp_path):
    with pytest.raises(CacheError, match=r"cannot be finished: 1 shard is missing, the first is 1"):
        SOURCE.write(tmp_path, shards=range(0, 3, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": {"identity": ImportIdentity(source_format="x", sha256="f" * 64)}}, "teacher.identity.kind"),
        ({"sequences": {"max_length": 8, "packing": "none"}}, "sequences.max_length is 16 there and 8 here"),
        ({"corpus": {"fingerprint": "f" * 64}}, "corpus.fingerprint"),
        ({"task": "other"}, "task is 'causal-lm' there and 'other' here"),
        ({"provenance": {"transcoded": [{"source": "f" * 64}]}}, "it is a dump there and a transcoding here"),
    ],
)
def test_another_cache_is_not_written_over(copy, changes, words):
    before = snapshot(copy)
    plan = SOURCE.plan()
    values = {
        name: getattr(plan, name).model_copy(update=value) if name in ("teacher", "corpus") else value
        for name, value in changes.items()
    }
    with (
        CacheWriter(Folder(str(copy))) as writer,
        pytest.raises(CacheError, match=f"holds another cache: .*{words}.*another output"),
    ):
        writer.begin(plan.model_copy(update=values), SOURCE.table(), {})
    assert snapshot(copy) == before


def test_another_name_for_the_same_content_is_the_same_cache(copy):
    plan = SOURCE.plan()
    teacher = TeacherRecord(**{**plan.teacher.model_dump(), "name": "elsewhere", "revision": "abc"})
    corpus = plan.corpus.model_copy(update={"sources": ("moved.jsonl",)})
    changed = plan.model_copy(update={"teacher": teacher, "corpus": corpus, "provenance": {"created": "later"}})
    with CacheWriter(Folder(str(copy))) as writer:
        assert writer.begin(changed, SOURCE.table(), {}) == []


def test_a_foreign_directory_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match=r"not empty and holds no cache \(found thesis\.tex\); choose another"):
        SOURCE.write(tmp_path)
    assert snapshot(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_start_that_was_cut_short_begins_again(tmp_path):
    (tmp_path / ".lock").touch()  # what a writer makes first
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("half")
    (tmp_path / "plan.parquet.1234.tmp").write_text("half")
    SOURCE.write(tmp_path)
    assert verify_cache(str(tmp_path)).ok
    assert not list(tmp_path.rglob("*.tmp"))


def test_garbage_of_an_attempt_that_lost_is_removed(tmp_path):
    SOURCE.write(tmp_path, shards=range(1), finish=False)
    left = ("fields/targets/000001-dead.zarr.zip", "fields/hidden-1/000002-dead.zarr.zip", "sequences/x.arrow.1.tmp")
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "commits" / "000001.json.5678.tmp").write_text("{")
    SOURCE.write(tmp_path)
    assert verify_cache(str(tmp_path), deep=True).ok
    assert not [name for name in snapshot(tmp_path) if "dead" in name or name.endswith(".tmp")]


def test_output_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match=r"is a file; give a directory"):
        SOURCE.write(tmp_path / "file")
    with pytest.raises(CacheError, match=r"cannot write to output .*: Not a directory"):
        SOURCE.write(tmp_path / "file" / "below")


HOLD = """
import sys
from kdcache.cache import CacheWriter
from kdcache.storage.folder import Folder
with CacheWriter(Folder(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CacheError, match=r"another process is writing to .*; wait for it or choose another"):
            SOURCE.write(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    SOURCE.write(tmp_path)  # the lock died with the process
    assert verify_cache(str(tmp_path)).ok


@pytest.mark.parametrize("failing", ["fields/targets/", "fields/hidden-1/", "sequences/", "commits/", "manifest.json"])
def test_a_full_disk_is_a_message_and_loses_nothing(tmp_path, monkeypatch, failing):
    real = os.replace

    def full(source, target):
        if f"{tmp_path}/{failing}" in str(target) and "000000" not in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheError, match=rf"cannot write .*{failing}.*No space left on device; .* resumes from there"):
        SOURCE.write(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    before = snapshot(tmp_path)
    SOURCE.write(tmp_path)
    assert verify_cache(str(tmp_path), deep=True).ok
    committed = {name for name in before if "000000" in name}
    assert len(committed) == 6
    assert {name: snapshot(tmp_path).get(name) for name in committed} == {name: before[name] for name in committed}


def test_the_tokenizers_files_are_kept(copy):
    cache = open_cache(str(copy))
    assert cache.tokenizer_json() == '{"version": "1.0"}'
    assert [path.name for path in cache.tokenizer_dir().iterdir()] == ["tokenizer.json"]


def test_statistics_do_not_depend_on_how_sequences_are_sharded(tmp_path):
    totals = []
    for size in (1, 4, 13):
        SyntheticCache(shard_sequences=size).write(tmp_path / str(size))
        totals.append(open_cache(str(tmp_path / str(size))).manifest.statistics)
    for other in totals[1:]:
        for name, value in totals[0].model_dump().items():
            assert getattr(other, name) == pytest.approx(value)


def test_damaged_tokenizer_files_are_made_good_and_never_recorded(copy):
    path = copy
    manifest = (path / "manifest.json").read_bytes()
    file = path / "tokenizer" / "tokenizer.json"
    good = file.read_bytes()
    file.write_bytes(good.replace(b"1.0", b"6.6"))
    (path / "tokenizer" / ".DS_Store").write_bytes(b"left by a file manager")
    SOURCE.write(path)
    assert file.read_bytes() == good
    assert (path / "manifest.json").read_bytes() == manifest
    assert verify_cache(str(path)).problems == []


def test_a_stray_file_beside_the_tokenizer_does_not_change_the_fingerprint(copy):
    path = copy
    manifest = (path / "manifest.json").read_bytes()
    (path / "tokenizer" / "notes.txt").write_text("mine")
    SOURCE.write(path)
    assert (path / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("damage", ["remove", "overwrite"])
def test_a_lost_plan_table_is_written_again(copy, damage):
    path = copy
    table = path / "plan.parquet"
    good = table.read_bytes()
    if damage == "remove":
        table.unlink()
    else:
        table.write_bytes(good[:-1] + b"?")
    SOURCE.write(path)
    assert table.read_bytes() == good
    assert verify_cache(str(path)).problems == []


def test_a_damaged_manifest_is_written_again(copy):
    path = copy
    manifest = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(manifest[: len(manifest) // 2])
    SOURCE.write(path)
    assert (path / "manifest.json").read_bytes() == manifest


def test_rows_of_another_width_than_planned_are_refused(tmp_path):
    cache = SyntheticCache(hidden=("hidden-1",))
    for states in cache.states:
        states["hidden-1"] = states["hidden-1"][:, :3]
    with pytest.raises(CacheError, match=r"field hidden-1, array states: rows of \(3,\), the plan says \(6,\)"):
        cache.write(tmp_path / "cache")


def test_a_dump_that_wrote_nothing_does_not_forbid_another(tmp_path):
    SOURCE.write(tmp_path, shards=range(0), finish=False)
    other = SyntheticCache(seed=9)
    other.write(tmp_path)
    assert len(open_cache(str(tmp_path))) == len(other.tokens)
    assert verify_cache(str(tmp_path), deep=True).problems == []
