"""Caches from a stranger: whatever the manifest says, a readable error and no harm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from kdcache.cache import CacheWriter, layout, open_cache
from kdcache.cache.sequence_table import decode_table
from kdcache.config import build
from kdcache.errors import CacheError, ConfigError, CorruptCacheError, IncompleteCacheError
from kdcache.storage.folder import Folder
from kdcache.transcode import TranscodeConfig, transcode_cache
from kdcache.transfer import pull_cache
from kdcache.verify.stored import verify_cache
from tests.caches import SOURCE
from tests.loops import loop
from tests.synthetic import SyntheticCache


def change_manifest(path: Path, change) -> None:
    """Change the manifest as somebody does who means to: with no checksum that would tell."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("checksum", None)
    change(manifest)
    (path / "manifest.json").write_bytes(layout.canonical_json(manifest))


def replace_object(path: Path, field: str, data: bytes) -> None:
    """Replace an object of shard 0 and make the manifest agree with it."""

    def change(manifest):
        record = manifest["shards"][0]["objects"][field]
        (path / record["path"]).write_bytes(data)
        record.update(num_bytes=len(data), sha256=layout.sha256(data))

    change_manifest(path, change)


def resume(path: Path, target: Path) -> None:
    """Begin the dump again whose unfinished cache is in ``path``."""
    if not (path / "manifest.json").is_dir():
        (path / "manifest.json").unlink(missing_ok=True)
    with CacheWriter(Folder(str(path))) as writer:
        writer.begin(SOURCE.plan(), SOURCE.table(), {"tokenizer.json": b"{}"})


#: What is done with a cache of a stranger that writes somewhere else, or into it.
USES = {
    "read": lambda path, target: use(path),
    "verify": lambda path, target: verify_cache(str(path), progress=False),
    "pull": lambda path, target: pull_cache(str(path), str(target), progress=False),
    "pull a part": lambda path, target: pull_cache(str(path), str(target), shards=[0], progress=False),
    "transcode": lambda path, target: transcode_cache(
        build(TranscodeConfig, {"source": str(path), "output": str(target)}), progress=False
    ),
    "resume": resume,
}


def use(path: Path) -> None:
    cache = open_cache(str(path))
    cache.read([0, 12], fields=cache.manifest.hidden_layers)
    cache.sequence_table()
    assert len(cache.lengths_N) == len(cache)


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../outside", "shards/../../outside", "a\\..\\b", "C:/x", "s3://bucket/x", "", "a\0b"]
)
@pytest.mark.parametrize("kind", ["object", "tokenizer"])
def test_paths_that_leave_the_cache(copy, target, kind):
    def change(manifest):
        record = manifest["shards"][1]["objects"]["targets"] if kind == "object" else manifest["tokenizer_files"][0]
        record["path"] = target

    change_manifest(copy, change)
    with pytest.raises(CorruptCacheError, match=r"manifest\.json is damaged: .*path: path .* leads outside the cache"):
        open_cache(str(copy))


def set_at(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        node = manifest
        for part in path:
            node = node[part]
        node[last] = value

    return change


#: What a stranger may write where a record has a name or a path; made with care, so that all hashes are right.
HOSTILE_NAMES = {
    "up": "hidden-1/../../../victim",
    "absolute": "/victim",
    "only up": "..",
    "empty": "",
    "capital twin": "TOKENS/../tokens",
    "control": "hidden\x1b[2J",
    "right to left": "hidden\u202e1",
    "too long": "h" * 101,
    "query": "hidden?x=1#y",
    "glob": "hidden*",
}


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_become_paths(name, copy, tmp_path):
    """Fields and attempts named like this wrote outside the target; a second pull removed files there."""
    wanted, ours = HOSTILE_NAMES[name], tmp_path / "victim" / "thesis.tex"
    ours.parent.mkdir()
    ours.write_text("three years of work")

    def rename_field(manifest):
        next(field for field in manifest["fields"] if field["name"] == "hidden-1")["name"] = wanted
        for shard in manifest["shards"]:
            shard["objects"][wanted] = shard["objects"].pop("hidden-1")

    before = (copy / "manifest.json").read_bytes()
    for change in (rename_field, set_at("shards", 0, "attempt", wanted)):
        (copy / "manifest.json").write_bytes(before)
        change_manifest(copy, change)
        for attempt in range(2):
            with pytest.raises(CorruptCacheError, match=r"manifest\.json is damaged: .* is no name"):
                pull_cache(str(copy), str(tmp_path / "pulled"), progress=False)
            assert not (tmp_path / "pulled").exists(), attempt
    assert [path.name for path in ours.parent.iterdir()] == ["thesis.tex"]


def test_files_of_records_are_no_objects(copy):
    """A record that calls the manifest, the plan or a writer's file its object would have them overwritten."""
    for path in ("manifest.json", "Plan.json", "commits/000000.json", "writer.json", "fields/x.tmp", "plan.parquet"):
        change_manifest(copy, set_at("shards", 0, "objects", "targets", "path", path))
        with pytest.raises(CorruptCacheError, match=r"belongs to a record of the cache"):
            open_cache(str(copy))


def test_two_objects_at_one_path(copy):
    change_manifest(copy, set_at("tokenizer_files", 0, "path", "tokenizer/TOKENIZER.JSON"))
    change_manifest(
        copy, lambda m: m["tokenizer_files"].append({**m["tokenizer_files"][0], "path": "tokenizer/tokenizer.json"})
    )
    with pytest.raises(CorruptCacheError, match=r"two files have the path 'tokenizer/tokenizer.json'"):
        open_cache(str(copy))


@pytest.mark.parametrize("directory", ["commits", "fields/targets", "sequences"])
def test_a_link_inside_a_target_does_not_lead_out_of_it(directory, sound, tmp_path):
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    (outside / "000000-deadbeef.zarr.zip").write_text("not ours")
    pull_cache(str(sound), str(target), progress=False)
    shutil.rmtree(target / directory)
    (target / directory).symlink_to(outside)
    with pytest.raises(CacheError, match=r"is a link that leads outside .*; nothing is written there"):
        pull_cache(str(sound), str(target), progress=False)
    assert [path.name for path in outside.iterdir()] == ["000000-deadbeef.zarr.zip"]


def test_only_what_a_writer_leaves_is_removed(sound, tmp_path):
    target = tmp_path / "target"
    pull_cache(str(sound), str(target), progress=False)
    note = target / "fields" / "targets" / "notes about 000000.txt"
    note.write_text("somebody's")
    left = target / "fields" / "targets" / "000001-deadbeef.zarr.zip"
    left.write_text("of an attempt that was killed")
    (target / "manifest.json").unlink()
    pull_cache(str(sound), str(target), progress=False)
    assert note.exists()
    assert not left.exists()


def place(kind: str, path: Path) -> None:
    """Put something that is no file where a cache has a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "directory":
        (path / "inside").mkdir(parents=True)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        os.mkfifo(path)


@loop("kind", ["directory", "loop", "pipe"])
@loop("name", ["manifest.json", "plan.json", "plan.parquet", "commits/000000.json", "commits", "object", "tokenizer"])
def test_what_is_no_file(name, kind, sound, tmp_path):
    """An error that names the place, or work that is done in spite of it; never an error of the operating system."""
    record = open_cache(str(sound)).manifest.shards[0].objects["targets"]
    for action, run in USES.items():
        path, target = (tmp_path / f"{name.replace('/', ' ')} {kind} {action} {end}" for end in "ab")
        shutil.copytree(sound, path)
        place(kind, path / {"object": record.path}.get(name, name))
        error = None
        try:
            run(path, target)
        except CacheError as raised:
            error = raised
        assert error is None or str(tmp_path) in str(error)


def test_a_lock_that_is_a_link_changes_no_other_file(sound, tmp_path):
    target, ours = tmp_path / "target", tmp_path / "ours"
    pull_cache(str(sound), str(target), progress=False)
    ours.write_text("three years of work")
    (target / ".lock").unlink(missing_ok=True)
    (target / ".lock").symlink_to(ours)
    with pytest.raises(CacheError, match=r"\.lock is a link; remove it"):
        pull_cache(str(sound), str(target), progress=False)
    assert ours.read_text() == "three years of work"


@loop("name", HOSTILE_NAMES)
@loop("record", ["plan", "commit"])
def test_an_unfinished_cache_of_a_stranger(record, name, tmp_path):
    """What is resumed, or written over, is read too: its names must not lead out of it."""
    ours, path = tmp_path / "victim", tmp_path / f"cache {record} {name}"
    ours.mkdir(exist_ok=True)
    (ours / "000000-deadbeef.zarr.zip").write_text("three years of work")
    SOURCE.write(path, shards=range(2), finish=False)
    file = path / ("plan.json" if record == "plan" else "commits/000000.json")
    values = json.loads(file.read_text())
    if record == "plan":
        values["fields"][1]["name"] = HOSTILE_NAMES[name]
        shutil.rmtree(path / "commits")  # then another plan may take the folder over, and clean it
    else:
        values["objects"]["targets"]["path"] = f"{HOSTILE_NAMES[name]}/000000-deadbeef.zarr.zip"
    file.write_bytes(layout.canonical_json(values))
    if record == "plan":
        with pytest.raises(CorruptCacheError, match=r"plan\.json is damaged: fields\.1\.name: .* is no name"):
            resume(path, path)
    else:  # the shard is made again
        with CacheWriter(Folder(str(path))) as writer:
            missing = writer.begin(SOURCE.plan(), SOURCE.table(), {"tokenizer.json": b"{}"})
        assert missing == [0, 2]
    assert (ours / "000000-deadbeef.zarr.zip").read_text() == "three years of work"


@loop("name", ["../x", "a/../../x", "/x", "a//x", "./x", "a\\x", "C:/x", "a\0", "a\nb", "..", "x/.."])
@loop("root", ["local", "memory"])
def test_every_access_checks_its_path(root, name, tmp_path):
    folder = Folder(str(tmp_path / "in") if root == "local" else "memory://in/side")
    for access in (
        folder.read,
        folder.exists,
        folder.size,
        folder.names,
        folder.remove,
        lambda name: folder.write(name, b"x"),
        lambda name: folder.create(name, b"x"),
        lambda name: folder.fetch(name, tmp_path / "fetched"),
    ):
        with pytest.raises(CacheError, match=r"leads outside"):
            access(name)
    assert not list(tmp_path.iterdir())


def test_paths_longer_than_a_file_system_takes(copy):
    for path in ("fields/" + "a" * 256, "/".join(["fields", *["a" * 100] * 11])):
        change_manifest(copy, set_at("shards", 0, "objects", "targets", "path", path))
        with pytest.raises(CorruptCacheError, match=r"manifest\.json is damaged: .*path 'fields/a+"):
            open_cache(str(copy))


def test_a_tokenizer_of_somebody_else_stays(tmp_path):
    """It was taken for the beginning of a cache, of which a writer removes what is there."""
    ours = tmp_path / "output" / "tokenizer" / "tokenizer.json"
    ours.parent.mkdir(parents=True)
    ours.write_text("trained for a week")
    with pytest.raises(CacheError, match=r"is not empty and holds no cache \(found tokenizer\)"):
        SOURCE.write(tmp_path / "output")
    assert ours.read_text() == "trained for a week"
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "tokenizer", "tokenizer.json"]


def test_objects_do_not_lie_beside_the_tokenizer(copy):
    change_manifest(copy, set_at("shards", 0, "objects", "targets", "path", "tokenizer/evil.py"))
    with pytest.raises(CorruptCacheError, match=r"'tokenizer/evil\.py' lies in tokenizer/, but is none of a tokenizer"):
        open_cache(str(copy))


#: By file of a cache: what a stranger may put in its place.
@pytest.mark.parametrize(
    "name", ["manifest.json", "plan.json", "plan.parquet", "commits/000000.json", "object", "tokenizer"]
)
def test_files_of_20_gb_are_not_read(name, copy, forbid_large_arrays):
    manifest = json.loads((copy / "manifest.json").read_text())
    objects = {
        "object": manifest["shards"][0]["objects"]["targets"]["path"],
        "tokenizer": manifest["tokenizer_files"][0]["path"],
    }
    with open(copy / objects.get(name, name), "r+b") as file:
        file.truncate(20 << 30)
    if name == "plan.json":
        (copy / "manifest.json").unlink()  # else the plan is not read
    forbid_large_arrays(1 << 30)
    if name == "manifest.json" or name == "plan.json":
        with pytest.raises(CorruptCacheError, match=rf"file {name} of .* has 21,474,836,480 bytes, at most"):
            open_cache(str(copy))
        return
    report = verify_cache(str(copy), progress=False)
    assert any(objects.get(name, name).rpartition("/")[2] in problem for problem in report.problems)


def test_files_of_20_gb_that_the_manifest_announces(copy, tmp_path, forbid_large_arrays):
    def announce(manifest):
        record = manifest["shards"][0]["objects"]["targets"]
        record["num_bytes"] = 20 << 30
        with open(copy / record["path"], "r+b") as file:
            file.truncate(20 << 30)

    change_manifest(copy, announce)
    forbid_large_arrays(1 << 30)
    for action in ("read", "verify", "pull", "pull a part", "transcode"):
        with pytest.raises(CacheError, match=r"fields/targets/0.* (does not fit into the memory|takes 21,474,836,480)"):
            USES[action](copy, tmp_path / action)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_only_regular_files_are_read(kind, copy):
    (copy / "manifest.json").unlink()
    if kind == "fifo":
        os.mkfifo(copy / "manifest.json")
    else:
        (copy / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(CorruptCacheError, match=r"file manifest\.json of .* is no regular file"):
        open_cache(str(copy))


def test_counts_that_no_cache_has_cost_nothing(copy, forbid_large_arrays):
    forbid_large_arrays(1 << 30)
    plan = (copy / "plan.json").read_bytes()
    for count in (10**9, 2**53):
        change_manifest(copy, set_at("num_shards", count))
        with pytest.raises(CorruptCacheError, match=rf"it lists 3 shards, num_shards is {count}"):
            open_cache(str(copy))
        (copy / "plan.json").write_bytes(layout.canonical_json(json.loads(plan) | {"num_shards": count}))
        (copy / "manifest.json").rename(copy / "aside")
        with pytest.raises(IncompleteCacheError, match=rf"3 of {count:,} shards are written"):
            open_cache(str(copy))
        (copy / "aside").rename(copy / "manifest.json")
    for count in (-1, 2**53 + 1, 10**30, 10**400):
        change_manifest(copy, set_at("num_shards", count))
        with pytest.raises(CorruptCacheError, match=r"manifest\.json is damaged: num_shards: Input should be"):
            open_cache(str(copy))


def test_deep_nesting(copy):
    deep: list = []
    for _ in range(900):
        deep = [deep]
    change_manifest(copy, set_at("provenance", "x", deep))
    with pytest.raises(CorruptCacheError, match=r"provenance: is nested more than 32 levels deep"):
        open_cache(str(copy))
    text, deeper = (copy / "manifest.json").read_text(), "[" * 100_000 + "]" * 100_000
    (copy / "manifest.json").write_text(text.replace('"provenance": {', f'"provenance": {{"y": {deeper},', 1))
    with pytest.raises(CorruptCacheError, match=r"manifest\.json is damaged: it is nested more deeply"):
        open_cache(str(copy))


def test_numbers_of_any_length(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"num_shards": 3', '"num_shards": ' + "9" * 5000))
    with pytest.raises(CorruptCacheError, match=r"manifest\.json is not valid JSON: Exceeds the limit"):
        open_cache(str(copy))


@loop("name", ["max_length", "max_target_length"])
@loop("value", ["x", 0, -4, True, 10**12, [1], None, 16.5])
def test_lengths_of_sequences_that_are_none(name, value, sound, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(sound, path, dirs_exist_ok=True)
    change_manifest(path, set_at("sequences", name, value))
    with pytest.raises(CorruptCacheError, match=rf"sequences\.{name} is not a number from 1 to 2147483647: "):
        open_cache(str(path))


def test_other_encodings(copy):
    data = (copy / "manifest.json").read_text()
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        (copy / "manifest.json").write_bytes(data.encode(encoding))
        with pytest.raises(CorruptCacheError, match=r"manifest\.json is not valid JSON"):
            open_cache(str(copy))


#: By member: what fills it up. A list of every error in these took 13 GB and a minute for a file of 16 MB.
MANY_WRONG = {
    "shards": ('"shards": [', "0," * 500_000),
    "tokenizer_files": ('"tokenizer_files": [', "{}," * 300_000),
    "arrays": ('"arrays": [', "[]," * 300_000),
    "sources": ('"sources": [', "1," * 500_000),
    "num_rows": ('"num_rows": {', "".join(f'"{number}":-1,' for number in range(100_000))),
    "objects": ('"objects": {', "".join(f'"{number}":0,' for number in range(100_000))),
    "twice": ('"provenance": {', "".join(f'"{number}":0,' for number in range(200_000)) + '"199999":0,'),
}


@loop("member", MANY_WRONG)
def test_millions_of_wrong_members(member, sound, tmp_path, forbid_large_arrays):
    path = tmp_path / "copy"
    shutil.copytree(sound, path, dirs_exist_ok=True)
    opening, filling = MANY_WRONG[member]
    text = (path / "manifest.json").read_text()
    assert opening in text
    (path / "manifest.json").write_text(text.replace(opening, opening + filling, 1))
    forbid_large_arrays(300 << 20)
    with pytest.raises(CorruptCacheError) as caught:
        open_cache(str(path))
    assert len(str(caught.value)) < 1000


def counted_as(axis, extra=10**13):
    """Every count of the manifest agrees, none with what is there."""

    def change(manifest):
        manifest[f"num_{axis}"] += extra
        manifest["shards"][0]["num_rows"][axis] += extra

    return change


@loop("axis", ["sequences", "tokens", "positions"])
def test_lies_on_which_all_counts_agree(axis, sound, tmp_path, forbid_large_arrays):
    path = tmp_path / "copy"
    shutil.copytree(sound, path, dirs_exist_ok=True)
    change_manifest(path, counted_as(axis))
    forbid_large_arrays(300 << 20)
    assert verify_cache(str(path), deep=True, progress=False).problems
    for number, action in enumerate(USES.values()):
        with contextlib.suppress(CacheError, ConfigError):
            action(path, tmp_path / f"{axis}-{number}")


def all_counts_huge(manifest):
    extra = 10**13
    manifest["num_positions"] += extra
    manifest["num_tokens"] += extra
    manifest["shards"][0]["num_rows"]["positions"] += extra
    manifest["shards"][0]["num_rows"]["tokens"] += extra


def no_targets(manifest):
    manifest["fields"] = [field for field in manifest["fields"] if field["name"] != "targets"]
    for shard in manifest["shards"]:
        del shard["objects"]["targets"]


def lacks_array(name):
    def change(manifest):
        for field in manifest["fields"]:
            field["arrays"] = [array for array in field["arrays"] if array["name"] != name]

    return change


LIES = {
    "huge counts": all_counts_huge,
    "huge width": set_at("fields", 2, "arrays", 0, "shape", [10**12]),
    "wrong width": set_at("fields", 2, "arrays", 0, "shape", [7]),
    "wrong dtype": set_at("fields", 2, "arrays", 0, "dtype", "float64"),
    "no dtype": set_at("fields", 2, "arrays", 0, "dtype", "quaternion"),
    "other array": set_at("fields", 2, "arrays", 0, "name", "more"),
    "rows of something else": set_at("fields", 2, "arrays", 0, "rows", "tokens"),
    "rows of nothing": set_at("fields", 2, "arrays", 0, "rows", "pages"),
    "no targets": no_targets,
    "no tokens": lacks_array("tokens"),
    "no log_tail": lacks_array("log_tail"),
    "no states": lacks_array("states"),
    "shards out of order": lambda manifest: manifest["shards"].reverse(),
    "shard twice": lambda manifest: manifest["shards"].append(manifest["shards"][0]),
    "more sequences": set_at("num_sequences", 14),
    "negative": set_at("shards", 0, "num_rows", "positions", -5),
    "object missing": lambda manifest: manifest["shards"][1]["objects"].pop("hidden-1"),
    "text for a number": set_at("num_shards", "many"),
    "rows not counted": lambda manifest: manifest["shards"][0]["num_rows"].pop("tokens"),
    "missing key": lambda manifest: manifest.pop("tokenizer"),
    "wrong size": set_at("shards", 0, "objects", "targets", "num_bytes", 17),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_the_manifest(copy, lie, forbid_large_arrays):
    change_manifest(copy, LIES[lie])
    forbid_large_arrays(200 << 20)
    with pytest.raises(CorruptCacheError) as caught:
        use(copy)
    assert str(copy) in str(caught.value)
    assert "cannot be decoded" not in str(caught.value)
    report = verify_cache(str(copy), deep=True)
    assert report.problems


def test_an_unknown_codec(copy):
    change_manifest(copy, set_at("fields", 1, "codec", "name", "compcat"))
    with pytest.raises(CacheError, match=r"codec 'compcat'; did you mean 'compact'") as caught:
        open_cache(str(copy))
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_newer_format(copy, name):
    data = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps({**data, "format_version": 3, "invention": 1}))
    if name == "plan.json":
        (copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match=rf"{name} has format version 3, this kdcache reads 2; install a newer"):
        open_cache(str(copy))


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"num_shards": 1e999}', b"[" * 100_000, b'"text"'],
    ids=lambda data: repr(data[:12]),
)
def test_garbled_json(copy, name, data):
    (copy / name).write_bytes(data)
    if name == "plan.json":
        (copy / "manifest.json").unlink()
    with pytest.raises(CorruptCacheError, match=rf"{name} is "):
        open_cache(str(copy))


def test_truncated_manifest(copy):
    data = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptCacheError, match=r"manifest\.json is not valid JSON"):
        open_cache(str(copy))


def test_a_table_with_other_rows_or_columns(copy):
    table = SyntheticCache(packed=True).table()
    for changed, words in (
        (table.slice(0, 4), "4 rows for 5 sequences"),
        (table.slice(0, 5).drop_columns(["num_positions"]), "no column 'num_positions'"),
    ):
        replace_object(copy, "sequences", layout.table_to_ipc(changed))
        with pytest.raises(CorruptCacheError, match=f"shard 0, field sequences.*{words}"):
            use(copy)


@pytest.mark.parametrize("data", [b"", b"ARROW1\0\0nothing", b"x" * 1000], ids=repr)
def test_a_table_that_is_no_table(copy, data):
    replace_object(copy, "sequences", data)
    with pytest.raises(CorruptCacheError, match=r"shard 0, field sequences.* not a readable Arrow file"):
        use(copy)


def test_a_flipped_bit_in_a_table_is_an_error_or_harmless(copy, forbid_large_arrays):
    manifest = json.loads((copy / "manifest.json").read_text())
    data = (copy / manifest["shards"][0]["objects"]["sequences"]["path"]).read_bytes()
    forbid_large_arrays(1 << 30)
    refused = 0
    for bit in range(0, 8 * len(data), 97):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decode_table(bytes(damaged), None, "here")
        except CacheError:  # a length that is damaged may be beyond the limit
            refused += 1
    assert refused


def test_no_cache(tmp_path):
    for path in (tmp_path, tmp_path / "missing", Path(__file__)):
        with pytest.raises(CacheError, match=r"there is no cache in .*; make one with kdcache dump-teacher"):
            open_cache(str(path))
    with pytest.raises(CacheError, match="cannot open nosuch://x"):
        open_cache("nosuch://x")


def test_half_a_cache(tmp_path):
    source = SyntheticCache()
    source.write(tmp_path, shards=range(2), finish=False)
    with pytest.raises(
        IncompleteCacheError, match=r"unfinished: 2 of 4 shards are written; run the command that began it again"
    ):
        open_cache(str(tmp_path))
    with pytest.raises(IncompleteCacheError):
        verify_cache(str(tmp_path))


@pytest.mark.parametrize("change", ["no shapes", "no max_length"])
def test_a_manifest_that_lacks_what_readers_need(tmp_path, change):
    path = tmp_path / "cache"
    SyntheticCache().write(path)
    manifest = json.loads((path / "manifest.json").read_text())
    if change == "no shapes":
        for array in manifest["fields"][1]["arrays"]:
            array["shape"] = []
    else:
        del manifest["sequences"]["max_length"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptCacheError, match=r"array name=.* its codec makes .*|max_length is not a number"):
        open_cache(str(path))


def test_a_store_whose_client_fails_in_its_own_way(monkeypatch):
    folder = Folder("memory://far/away")

    def refuse(*arguments, **settings):
        raise LookupError("connection refused by peer")

    monkeypatch.setattr("kdcache.storage.retry.PAUSES_S", (0.001,) * 4)
    for name in ("cat_file", "exists", "info", "ls"):
        monkeypatch.setattr(folder._fs, name, refuse)
    for call in (lambda: folder.read("x"), lambda: folder.exists("x"), lambda: folder.size("x"), folder.names):
        with pytest.raises(CacheError, match=r"cannot reach memory://far/away: connection refused by peer"):
            call()


def test_any_changed_byte_of_a_manifest_is_seen(copy):
    """Of names, hashes of the corpus, sums and provenance nothing else tells that they are damaged."""
    sound = (copy / "manifest.json").read_bytes()
    assert json.loads(sound)["checksum"]
    changes = [(b'"random-numbers"', b'"random-numberz"'), (b'"made up"', b'"made vp"'), (b"0.1.0", b"0.3.0")]
    changes += [
        (b'"2222', b'"2322'),
        (b'"kept_mass_sum": ', b'"kept_mass_sum": 1'),
        (b'"max_length": 16', b'"max_length": 96'),
    ]
    changes.append((f'"checksum": "{json.loads(sound)["checksum"][:63]}'.encode(), b'"checksum": "' + b"I" * 63))
    for before, after in changes:
        assert before in sound, before
        (copy / "manifest.json").write_bytes(sound.replace(before, after, 1))
        with pytest.raises(
            CorruptCacheError, match=r"manifest\.json is damaged: its checksum is not that of its content"
        ):
            open_cache(str(copy))
    (copy / "manifest.json").write_bytes(sound)
    change_manifest(copy, lambda manifest: None)  # as an older kdcache wrote it
    assert "checksum" not in json.loads((copy / "manifest.json").read_text())
    open_cache(str(copy)).read([0])
