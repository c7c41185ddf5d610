from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.cache import layout, open_cache
from kdcache.cache.shard_file import pack
from kdcache.cli.verify import command
from kdcache.errors import CacheError, CorruptCacheError, IncompleteCacheError
from kdcache.verify.stored import check_files, verify_cache
from tests.cache.test_stranger import change_manifest
from tests.synthetic import SyntheticCache, random_targets


def files_of(path: Path) -> list[str]:
    """Every file of a cache but the writer's lock."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != ".lock")


def problems_of(path: Path, *, deep: bool = False) -> str:
    """Everything that a user is told about a damaged cache."""
    try:
        report = verify_cache(str(path), deep=deep)
    except CacheError as error:
        return str(error)
    assert report.ok == (not report.problems)
    return "\n".join(report.problems)


def place_of(name: str, path: Path) -> list[str]:
    """What a message about damage of file ``name`` must say."""
    manifest = json.loads((path / "manifest.json").read_text())
    for shard in manifest["shards"]:
        for field, record in shard["objects"].items():
            if record["path"] == name:
                return [name, f"shard {shard['index']}", f"field {field}"]
    return [name]


NUM_FILES = 3 * 5 + 3 + 4  # 5 objects and a record for each shard, manifest, plan, its table, tokenizer


def test_a_sound_cache(sound):
    assert len(files_of(sound)) == NUM_FILES
    for deep in (False, True):
        seen: list[tuple[int, int]] = []
        report = check_files(
            str(sound), deep=deep, report_progress=lambda done, total, seen=seen: seen.append((done, total))
        )
        assert report.ok, report.problems
        assert report.num_objects == 15
        assert report.num_files == NUM_FILES
        assert report.num_bytes == open_cache(str(sound)).manifest.num_bytes
        assert seen[-1][0] == seen[-1][1]
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.fixture(scope="module")
def scratch(sound, tmp_path_factory):
    return Path(shutil.copytree(sound, tmp_path_factory.mktemp("scratch") / "copy"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_any_file_is_found_and_named(scratch, data):
    for name in files_of(scratch):
        path = scratch / name
        original = path.read_bytes()
        place = place_of(name, scratch)
        bit = data.draw(st.integers(0, 8 * len(original) - 1), label=name)
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = problems_of(scratch)
        finally:
            path.write_bytes(original)
        for word in place:
            assert word in found, (name, bit, found)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "commits/000001.json", "tokenizer/tokenizer.json"])
def test_every_single_bit_of_a_record_counts(scratch, name):
    path = scratch / name
    original = path.read_bytes()
    # All bits of some bytes from everywhere: white space, keys, numbers, hashes.
    for byte in np.linspace(0, len(original) - 1, 25).astype(int).tolist():
        for bit in range(8):
            damaged = bytearray(original)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert name in problems_of(scratch), (byte, bit)
            finally:
                path.write_bytes(original)


def test_the_same_value_in_another_form_is_a_flipped_byte_too(tmp_path):
    source = SyntheticCache()
    source.write(tmp_path)
    path = tmp_path / "commits" / "000000.json"
    text = path.read_text()
    # 1 as 1.0, and one digit too many: nothing that a reader would notice.
    number = re.search(r'"entropy_sum": ([0-9.]+)', text).group(1)
    path.write_text(text.replace(number, number + "0"))
    assert "commits/000000.json is damaged" in problems_of(tmp_path)


@pytest.mark.parametrize("index", range(NUM_FILES))
@pytest.mark.parametrize("kind", ["deleted", "cut short", "emptied", "longer"])
def test_a_file_that_is_not_as_it_was(copy, index, kind):
    name = files_of(copy)[index]
    place = place_of(name, copy)
    data = (copy / name).read_bytes()
    if kind == "deleted":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes({"cut short": data[:-1], "emptied": b"", "longer": data + b"\0"}[kind])
    if name == "manifest.json" and kind == "deleted":
        with pytest.raises(IncompleteCacheError, match="3 of 3 shards are written"):
            verify_cache(str(copy))
        return
    found = problems_of(copy, deep=kind == "cut short")
    for word in place:
        assert word in found


def test_all_damage_is_listed_in_one_run(copy):
    for number, name in enumerate(files_of(copy)):
        if name.endswith((".zip", ".arrow")):
            data = bytearray((copy / name).read_bytes())
            data[number] ^= 1
            (copy / name).write_bytes(data)
    assert len(verify_cache(str(copy)).problems) == 15


def test_swapped_objects_are_found(copy):
    first, second = sorted((copy / "fields" / "targets").iterdir())[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    found = problems_of(copy)
    assert "shard 0, field targets" in found
    assert "shard 1, field targets" in found


# -------------------------------------------------------------------------- a writer that wrote nonsense correctly


def duplicate_ids(source):
    source.targets[7].ids_PK[0, 1] = source.targets[7].ids_PK[0, 0]


def increasing(source):
    source.targets[7].logprobs_PK[0] = source.targets[7].logprobs_PK[0, ::-1].copy()


def too_much_mass(source):
    source.targets[7].log_tail_P[0] = -0.1


def nan_entropy(source):
    source.targets[7].entropy_P[0] = np.nan


def negative_entropy(source):
    source.targets[7].entropy_P[0] = -1


def infinite_gold(source):
    source.targets[7].gold_logprob_P[0] = -np.inf


def positive_gold(source):
    source.targets[7].gold_logprob_P[0] = 0.5


def nan_logprob(source):
    source.targets[7].logprobs_PK[0, -1] = np.nan


def id_outside(source):
    source.targets[7].ids_PK[0, 0] = 50


def token_outside(source):
    source.tokens[7][0] = 50


def mask_of_two(source):
    source.masks[7][0] = 2


def infinite_states(source):
    source.states[7]["hidden-1"][0, 0] = np.inf


NONSENSE = {
    duplicate_ids: "keeps the same id twice",
    increasing: "log-probabilities increase along a row",
    too_much_mass: "kept mass and tail add up to 1.",
    nan_entropy: "array entropy, row 5: nan is no entropy",
    negative_entropy: "array entropy, row 5: -1.0 is no entropy",
    infinite_gold: "gold_logprob holds values",
    positive_gold: "array gold_logprob, row 5: 0.5 is no log-probability",
    nan_logprob: "array topk_logprobs, row 5, column 3: nan is no log-probability",
    id_outside: "array topk_ids, row 5, column 0: 50 is not below 50, the number of ids",
    token_outside: "array tokens, row 8: 50 is not below 50, the number of token ids",
    mask_of_two: "array loss_mask, row 5: 2 is not below 2, it is 0 or 1",
    infinite_states: "array states, row 5, column 0: inf is not finite",
}
#: What only the deep pass finds: the others are found by every reader too.
DEEP_ONLY = (duplicate_ids, increasing, too_much_mass, infinite_gold)
FIELD_OF = {token_outside: "tokens", mask_of_two: "tokens", infinite_states: "hidden-1"}


@pytest.mark.parametrize("nonsense", NONSENSE, ids=lambda change: change.__name__)
def test_nonsense_that_was_written_correctly(tmp_path, nonsense):
    source = SyntheticCache(hidden=("hidden-1",))
    nonsense(source)
    source.write(tmp_path)
    assert verify_cache(str(tmp_path)).ok
    problems = verify_cache(str(tmp_path), deep=True).problems
    assert problems
    field = FIELD_OF.get(nonsense, "targets")
    for problem in problems:
        assert problem.startswith(f"shard 1, field {field}, file fields/{field}/000001-")
    assert NONSENSE[nonsense] in "\n".join(problems)
    read(tmp_path, None if nonsense in DEEP_ONLY else NONSENSE[nonsense])


def read(path, words: str | None) -> None:
    """Read shard 1, which must be refused with ``words``, if there are any."""
    cache = open_cache(str(path))
    with pytest.raises(CorruptCacheError, match=re.escape(words)) if words else contextlib.nullcontext():
        cache.read([4], fields=cache.manifest.vector_fields)


def test_tokens_that_are_not_those_of_the_table(tmp_path):
    source = SyntheticCache()
    table = source.table()
    source.tokens[7] = (source.tokens[7] + 1) % 50
    source.table = lambda: table
    source.write(tmp_path)
    assert verify_cache(str(tmp_path)).ok
    [problem] = verify_cache(str(tmp_path), deep=True).problems
    assert "shard 1" in problem
    assert "sequence 7: tokens do not match the token_hash" in problem


def test_a_table_without_what_the_check_needs(tmp_path):
    source = SyntheticCache()
    table = source.table().drop_columns(["token_hash"])
    source.table = lambda: table
    source.write(tmp_path)
    [first, *_] = verify_cache(str(tmp_path), deep=True).problems
    assert "field sequences" in first
    assert "no column 'token_hash'" in first


def test_arrays_that_do_not_add_up(copy):
    cache = open_cache(str(copy))
    arrays = cache._open_shard(0).fields["tokens"].arrays
    record = cache.manifest.field("tokens")
    values = {a.path: arrays[a.name].copy() for a in record.arrays}
    values["sequences/num_positions"][0] += 1
    data = pack(values)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["checksum"]
    commit = manifest["shards"][0]
    target = commit["objects"]["tokens"]
    (copy / target["path"]).write_bytes(data)
    target.update(num_bytes=len(data), sha256=layout.sha256(data))
    (copy / "manifest.json").write_bytes(layout.canonical_json(manifest))
    (copy / "commits" / "000000.json").write_bytes(layout.canonical_json(commit))
    assert verify_cache(str(copy)).ok
    assert "shard 0, field tokens: sequences add up to" in problems_of(copy, deep=True)


@pytest.mark.parametrize("codec", ["compact", "fp16", "bf16", "exact"])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 60.0])
def test_sound_targets_of_every_codec_pass(tmp_path, codec, scale):
    source = SyntheticCache(4, codec=codec, top_k=8)
    source.targets = [random_targets(int(n), 8, 50, seed=int(n), scale=scale) for n in source.lengths]
    source.write(tmp_path)
    assert verify_cache(str(tmp_path), deep=True).problems == []


def test_a_large_shard_is_checked_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["kdcache.verify.stored"], "_DEEP_POSITIONS", 5)
    source = SyntheticCache(20, shard_sequences=20)
    source.targets[19].entropy_P[-1] = np.nan
    source.write(tmp_path)
    [problem] = verify_cache(str(tmp_path), deep=True).problems
    assert "entropy" in problem


@pytest.mark.parametrize("states", [1, 60, 1 << 20])
def test_hidden_states_are_checked_in_pieces_too(tmp_path, monkeypatch, states):
    monkeypatch.setattr(sys.modules["kdcache.verify.stored"], "_DEEP_STATES", states)
    source = SyntheticCache(20, shard_sequences=20, hidden=("hidden-1", "hidden-2"))
    source.states[2]["hidden-2"][-1, -1] = np.nan
    source.states[19]["hidden-2"][0, 0] = np.inf
    source.write(tmp_path)
    [problem] = verify_cache(str(tmp_path), deep=True).problems
    assert problem.endswith("array states, row 17, column 5: nan is not finite")


def test_the_deep_pass_unpacks_every_shard_once(sound, monkeypatch):
    decoder = sys.modules["kdcache.cache.decoder"]
    load, unpacked = decoder.load_fields, []
    monkeypatch.setattr(sys.modules["kdcache.verify.stored"], "_DEEP_POSITIONS", 5)
    monkeypatch.setattr(decoder, "load_fields", lambda *given: unpacked.append(given[2].index) or load(*given))
    assert verify_cache(str(sound), deep=True).ok
    assert unpacked == [0, 1, 2]


def test_what_no_shard_can_be_read_with_is_one_problem(copy):
    change_manifest(copy, lambda manifest: manifest["fields"][1]["codec"].update(name="exacter"))
    problems = verify_cache(str(copy), deep=True).problems
    assert len([problem for problem in problems if "unknown codec 'exacter'" in problem]) == 1


AGAIN, FETCH = "tokenizer files and LM head, run the command", "To repair a shard, copy its files again"


@pytest.mark.parametrize(
    ("names", "said", "not_said"),
    [
        (["plan.parquet"], [AGAIN], [FETCH]),
        (["tokenizer/tokenizer.json"], [AGAIN], [FETCH]),
        (["fields/targets"], [FETCH], [AGAIN]),
        (["commits/000000.json"], [FETCH], [AGAIN]),
        (["fields/targets", "plan.parquet"], [AGAIN, FETCH], []),
    ],
)
def test_the_advice_fits_the_problem(copy, names, said, not_said):
    for name in names:
        path = copy / name
        if path.is_dir():
            path = min(path.iterdir())
        path.write_bytes(path.read_bytes()[:-1])
    result = CliRunner().invoke(command, [str(copy), "--quiet"])
    assert result.exit_code == 1
    assert all(text in result.output for text in said)
    assert not any(text in result.output for text in not_said)
