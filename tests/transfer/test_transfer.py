"""Moving caches: to and from a real S3 server, interrupted, damaged, and in part."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kdcache.cache import layout, open_cache
from kdcache.errors import CacheError, ConfigError, CorruptCacheError, IncompleteCacheError
from kdcache.storage import retry
from kdcache.storage.folder import Folder
from kdcache.transfer import copy as transfer
from kdcache.transfer.part import parse_shards
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import snapshot
from tests.caches import KINDS, SOURCE
from tests.synthetic import SyntheticCache


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES_S", (0.01, 0.01, 0.02, 0.02))


def move(source: object, target: object, **options: object) -> transfer.TransferResult:
    return transfer.copy_cache(str(source), str(target), progress=False, **options)


def assert_same_rows(part: str, source: str, indices: list[int]) -> None:
    """Sequence n of ``part`` is sequence ``indices[n]`` of ``source``."""
    mine, theirs = open_cache(str(part)), open_cache(str(source))
    assert len(mine) == len(indices)
    layers = mine.manifest.hidden_layers
    a, b = mine.read(range(len(mine)), fields=layers), theirs.read(indices, fields=layers)
    np.testing.assert_array_equal(a.tokens_T, b.tokens_T)
    np.testing.assert_array_equal(a.loss_mask_P, b.loss_mask_P)
    np.testing.assert_array_equal(a.targets.logprobs_PK, b.targets.logprobs_PK)
    np.testing.assert_array_equal(a.targets.log_tail_P, b.targets.log_tail_P)
    for name in a.hidden:
        np.testing.assert_array_equal(a.hidden[name], b.hidden[name])


def test_there_and_back_gives_the_same_bytes(sound, object_store, tmp_path):
    pushed = move(sound, f"{object_store}/a/b")
    assert (pushed.num_files_moved, pushed.num_bytes_moved) == (pushed.num_files, pushed.num_bytes)
    assert verify_cache(f"{object_store}/a/b", deep=True).problems == []
    move(f"{object_store}/a/b", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(sound)
    assert pushed.fingerprint == open_cache(str(tmp_path / "back")).fingerprint
    assert "writer.json" not in Folder(f"{object_store}/a/b").names()


def test_nothing_moves_twice(sound, object_store, tmp_path):
    for target in (f"{object_store}/x", tmp_path / "x"):
        move(sound, target)
        again = move(sound, target)
        assert (again.num_files_moved, again.num_bytes_moved) == (0, 0)


def test_a_dry_run_writes_nothing(sound, object_store, tmp_path):
    result = move(sound, f"{object_store}/x", dry_run=True)
    assert result.num_files_moved == result.num_files > 0
    assert result.num_bytes_moved == sum(p.stat().st_size for p in sound.rglob("*") if counted(p, sound))
    assert Folder(f"{object_store}/x").names() == []
    move(sound, tmp_path / "x", dry_run=True)
    assert not (tmp_path / "x").exists()


def counted(path: Path, root: Path) -> bool:
    records = {"manifest.json", "plan.json", ".lock"}
    return path.is_file() and path.name not in records and path.parent != root / "commits"


@pytest.mark.parametrize("name", ["fields/targets/000001", "tokenizer/", "commits/000002"])
def test_an_interrupted_push_is_no_cache_and_goes_on(sound, object_store, monkeypatch, name):
    url, real, written = f"{object_store}/x", Folder.write, []

    def write(folder, path, data):
        if path.startswith(name):
            raise KeyboardInterrupt
        written.append(path)
        real(folder, path, data)

    monkeypatch.setattr(Folder, "write", write)
    with pytest.raises(KeyboardInterrupt):
        move(sound, url, jobs=1)
    monkeypatch.undo()
    assert "manifest.json" not in written
    with pytest.raises(IncompleteCacheError, match="is unfinished"):
        open_cache(url)
    before = {path for path in written if path.startswith(("fields", "sequences"))}
    result = move(sound, url)
    assert result.num_files_moved <= result.num_files - len(before)
    assert verify_cache(url, deep=True).problems == []
    assert open_cache(url).fingerprint == open_cache(str(sound)).fingerprint


def test_a_local_file_that_differs_is_pulled_again(sound, object_store, tmp_path):
    move(sound, f"{object_store}/x")
    shutil.copytree(sound, tmp_path / "x")
    [path] = (tmp_path / "x" / "fields" / "targets").glob("000001-*")
    path.write_bytes(bytes(path.stat().st_size))
    (tmp_path / "x" / "commits" / "000000.json").write_bytes(b"{}")
    (tmp_path / "x" / "fields" / "targets" / "x.tmp").write_bytes(b"half a file")
    result = move(f"{object_store}/x", tmp_path / "x")
    assert result.num_files_moved == 1
    assert snapshot(tmp_path / "x") == snapshot(sound)


def test_an_object_of_the_right_size_is_trusted_unless_it_is_to_be_checked(sound, object_store):
    url = f"{object_store}/x"
    move(sound, url)
    path = open_cache(url).manifest.shards[1].objects["hidden-2"].path
    Folder(url).write(path, bytes(Folder(url).size(path)))
    assert move(sound, url).num_files_moved == 0
    assert verify_cache(url).problems != []
    assert move(sound, url, check=True).num_files_moved == 1
    assert verify_cache(url, deep=True).problems == []


def test_a_damaged_source_is_named_and_leaves_no_manifest(copy, object_store, tmp_path):
    url = f"{object_store}/x"
    move(copy, url)
    path = open_cache(url).manifest.shards[2].objects["targets"].path
    Folder(url).write(path, bytes(Folder(url).size(path)))
    with pytest.raises(CorruptCacheError, match=f"file {path} of .* is damaged"):
        move(url, tmp_path / "x")
    assert not (tmp_path / "x" / path).exists()
    with pytest.raises(IncompleteCacheError):
        open_cache(str(tmp_path / "x"))
    (copy / path).unlink()
    with pytest.raises(CorruptCacheError, match=f"file {path} is missing"):
        move(copy, tmp_path / "y")


def test_a_store_that_fails_now_and_then_is_asked_again(sound, object_store, tmp_path, monkeypatch):
    move(sound, f"{object_store}/x")
    client = Folder(object_store)._fs  # clients are shared by all folders of a store
    real, asked = client.cat_file, set()

    def cat_file(path, *arguments, **options):
        if any(f"/x/{name}" in path for name in ("fields",)) and path not in asked:
            asked.add(path)
            raise OSError("connection reset by peer")
        return real(path, *arguments, **options)

    monkeypatch.setattr(client, "cat_file", cat_file)
    move(f"{object_store}/x", tmp_path / "x")
    assert len(asked) == 12
    assert snapshot(tmp_path / "x") == snapshot(sound)


def test_a_store_that_keeps_failing_is_a_message(sound, object_store, monkeypatch):
    def write(folder, name, data):
        raise CacheError(f"cannot write {name}: slow down")

    monkeypatch.setattr(Folder, "write", write)
    with pytest.raises(CacheError, match="slow down"):
        move(sound, f"{object_store}/x")


def test_other_caches_are_refused(sound, tmp_path, object_store):
    url = f"{object_store}/x"
    other = SyntheticCache(seed=7)
    other.write(url)
    with pytest.raises(CacheError, match=rf"fingerprint {open_cache(url).fingerprint[:16]}.*choose another target"):
        move(sound, url)
    other.write(tmp_path / "begun", shards=range(1), finish=False)
    with pytest.raises(CacheError, match="another unfinished cache"):
        move(sound, tmp_path / "begun")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match="not empty and holds no cache"):
        move(sound, tmp_path / "mine")
    with pytest.raises(IncompleteCacheError):
        move(tmp_path / "begun", tmp_path / "z")
    overlaps = {
        sound: "is the source itself",
        sound / "fields": "lies inside the source",
        sound.parent: "holds the source",
    }
    for target, words in overlaps.items():
        with pytest.raises(ConfigError, match=f"output {target} {words}.*; choose a directory outside it"):
            move(sound, target)


def test_the_same_path_in_another_kind_of_store_is_another_place(sound, monkeypatch):
    class OtherStore(MemoryFileSystem):
        protocol = "otherstore"
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("otherstore://"))

    fsspec.register_implementation("otherstore", OtherStore, clobber=True)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    move(sound, "memory://bucket/x")
    move("memory://bucket/x", "otherstore://bucket/x")
    assert OtherStore.store.keys() >= {"/bucket/x/manifest.json"}
    with pytest.raises(ConfigError, match="lies inside the source"):
        move("memory://bucket/x", "memory://bucket/x/y")


def test_an_error_without_words_is_told_by_its_kind():
    with pytest.raises(CacheError, match=r"cannot reach http://127\.0\.0\.1:9/x: NotImplementedError"):
        Folder("http://127.0.0.1:9/x").remove("plan.json")


def test_some_fields(sound, object_store):
    url = f"{object_store}/x"
    result = move(sound, url, fields=["hidden-2"])
    assert result.is_part
    cache = open_cache(url)
    assert [field.name for field in cache.manifest.fields] == ["tokens", "targets", "hidden-2"]
    assert verify_cache(url, deep=True).problems == []
    assert not Folder(url).names("fields/hidden-1")
    assert_same_rows(url, sound, list(range(13)))
    source = open_cache(str(sound)).fingerprint
    assert cache.manifest.provenance["part_of"] == [
        {"source": source, "fields": ["tokens", "targets", "hidden-2"], "shards": [0, 1, 2]}
    ]
    assert move(sound, url, fields=["targets", "hidden-2"]).num_files_moved == 0


def test_some_shards(sound, object_store, tmp_path):
    url = f"{object_store}/x"
    move(sound, url)
    move(url, tmp_path / "x", shards=[2, 0], fields=["targets"])
    cache = open_cache(str(tmp_path / "x"))
    assert verify_cache(str(tmp_path / "x"), deep=True).problems == []
    indices = [0, 1, 2, 3, 4, 10, 11, 12]
    assert_same_rows(str(tmp_path / "x"), url, indices)
    table, whole = cache.sequence_table(), open_cache(str(sound)).sequence_table()
    assert table["sequence"].to_pylist() == list(range(8))
    assert table["document_id"].to_pylist() == whole["document_id"].take(indices).to_pylist()
    assert cache.plan_table()["document_id"].to_pylist() == table["document_id"].to_pylist()
    assert cache.plan_table()["sequence"].to_pylist() == list(range(8))
    assert move(url, tmp_path / "x", shards=[0, 2], fields=["targets"]).num_files_moved == 0
    with pytest.raises(CacheError, match="choose another target"):
        move(url, tmp_path / "x", shards=[0, 1])
    move(tmp_path / "x", tmp_path / "y", shards=[1])
    assert_same_rows(str(tmp_path / "y"), url, [10, 11, 12])
    assert [link["shards"] for link in open_cache(str(tmp_path / "y")).manifest.provenance["part_of"]] == [[0, 2], [1]]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_every_kind_are_sound(written, tmp_path, kind):
    source = written(kind)
    move(source, tmp_path / "x", shards=[1, 3], fields=["targets"])
    assert verify_cache(str(tmp_path / "x"), deep=True).problems == []
    assert_same_rows(str(tmp_path / "x"), str(source), [4, 5, 6, 7, 12])
    cache = open_cache(str(tmp_path / "x"))
    if kind == "hidden":
        assert cache.manifest.hidden_layers == ("hidden-2",)
        assert cache.lm_head_file() == open_cache(str(source)).lm_head_file()
    if KINDS[kind].record.tail_prior:
        np.testing.assert_array_equal(cache.tail_prior_V, open_cache(str(source)).tail_prior_V)


def test_what_there_is_not(sound, tmp_path):
    with pytest.raises(CacheError, match="no field 'hiden-1'; did you mean 'hidden-1'"):
        move(sound, tmp_path / "x", fields=["targets", "hiden-1"])
    with pytest.raises(CacheError, match="no shard 3; its shards are 0 to 2"):
        move(sound, tmp_path / "x", shards=[1, 3])
    with pytest.raises(CacheError, match=r"no shard of .* was selected"):
        move(sound, tmp_path / "x", shards=[])
    with pytest.raises(CacheError, match="there is no cache"):
        move(tmp_path / "nothing", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_numbers_of_shards():
    assert parse_shards("0-3,7") == [0, 1, 2, 3, 7]
    assert parse_shards(" 5, 2-2 ,5") == [2, 5]
    for text in ("", "a", "3-1", "1-", "-1", "1,,2", "1-2-3"):
        with pytest.raises(CacheError, match="neither a number nor a range"):
            parse_shards(text)
    with pytest.raises(CacheError, match="no cache has a shard 99999999999"):
        parse_shards("0-99999999999")


def test_memory_is_bounded(sound, object_store, tmp_path, monkeypatch):
    """However many jobs there are, the bytes that are read but not yet written stay below the limit."""
    largest = max(r.num_bytes for s in open_cache(str(sound)).manifest.shards for r in s.objects.values())
    real_read, real_write, held, most = Folder.read, Folder.write, {}, [0]

    def read(folder, name, sha256=None, **bound):
        data = real_read(folder, name, sha256, **bound)
        if folder.local_path is None:
            held[name] = len(data)
            most[0] = max(most[0], sum(list(held.values())))
        return data

    def write(folder, name, data):
        real_write(folder, name, data)
        held.pop(name, None)

    move(sound, f"{object_store}/x")
    monkeypatch.setattr(transfer, "IN_FLIGHT_BYTES", largest)
    monkeypatch.setattr(Folder, "read", read)
    monkeypatch.setattr(Folder, "write", write)
    move(f"{object_store}/x", tmp_path / "x", jobs=16)
    records = sum(p.stat().st_size for p in sound.glob("*.json"))
    assert most[0] <= largest + records


def test_the_records_are_those_that_a_writer_writes(sound, tmp_path):
    move(sound, tmp_path / "x", shards=[1])
    before = snapshot(tmp_path / "x")
    manifest = open_cache(str(tmp_path / "x")).manifest
    assert layout.manifest_json(manifest) == (tmp_path / "x" / "manifest.json").read_bytes()
    assert SOURCE.lengths[5:10].sum() == manifest.num_positions
    (tmp_path / "x" / "plan.json").unlink()
    with pytest.raises(CacheError):
        SOURCE.write(tmp_path / "x")
    (tmp_path / "x" / "plan.json").write_bytes(before["plan.json"])
    with pytest.raises(CacheError, match="holds another cache"):
        SOURCE.write(tmp_path / "x")
    assert snapshot(tmp_path / "x") == before
