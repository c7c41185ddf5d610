"""Tables of a stranger, whose hashes are all right: refused with the place, and never read out of bounds."""

from __future__ import annotations

import io
import json
import shutil
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.cache import layout, open_cache
from kdcache.cache.sequence_table import load_table
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.storage.folder import Folder
from kdcache.transfer import pull_cache
from kdcache.verify.stored import verify_cache
from tests.cache.test_stranger import change_manifest, replace_object
from tests.loops import loop


class At(NamedTuple):
    """A column of five texts or lists whose offsets in the file become others, which need not be inside of it."""

    offsets: list[int]
    column: pa.Array = pa.array([f"page {number}" for number in range(5)])

    def written(self, table: pa.Table, name: str) -> bytes:
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:  # not compressed: offsets stand in the file as they are
            writer.write_table(table.combine_chunks())
        good = np.frombuffer(self.column.buffers()[1], np.int32)[:6].tobytes()
        assert sink.getvalue().count(good) == 1, name
        return sink.getvalue().replace(good, np.array(self.offsets, np.int32).tobytes())


LISTS = pa.array([[number] * 3 for number in range(5)])


def agree(path) -> None:
    """Make the plan and the commit records say what the manifest says."""
    manifest = json.loads((path / "manifest.json").read_text())
    for shard in manifest.pop("shards"):
        (path / f"commits/{shard['index']:06d}.json").write_bytes(layout.canonical_json(shard))
    plan = {name: value for name, value in manifest.items() if name not in ("tokenizer_files", "cache_files")}
    (path / "plan.json").write_bytes(layout.canonical_json(plan))


def union_of(num_rows: int) -> pa.Array:
    return pa.UnionArray.from_sparse(pa.array([0] * num_rows, pa.int8()), [pa.array(range(num_rows))])


def repeated(num_rows: int) -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array([num_rows], pa.int32()), pa.array(["a"]))


def changed(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    if name not in table.column_names:
        return table.append_column(name, column)
    return table.set_column(table.column_names.index(name), name, column)


def numbers(*values: int | None) -> pa.Array:
    return pa.array(values, pa.int32())


#: By what is wrong with the table of shard 0, which has 5 sequences: a column, what it becomes, words of the error.
TABLES = {
    "beyond the texts": ("source", At([0, *[3000] * 5]), "the column 'source': "),
    "2 GB beyond": ("document_id", At([0, *[2**31 - 1] * 5]), "the column 'document_id': "),
    "before the texts": ("source", At([0, *[-(2**30)] * 5]), "offset"),
    "falling offsets": ("source", At([0, 6, 1, 18, 24, 30]), "offset"),
    "no UTF-8": ("source", pa.array([b"\xff\xfe\xfd"] * 5).view(pa.string()), "UTF8"),
    "beyond the list": ("more", At([0, *[2**31 - 1] * 5], LISTS), "offset"),
    "beyond the dictionary": (
        "source",
        pa.DictionaryArray.from_arrays(pa.array([2**30] * 5, pa.int32()), pa.array(["a"]), safe=False),
        "out of bounds",
    ),
    "a union": ("more", union_of(5), "the column 'more' has the type sparse_union"),
    "repeated": ("more", repeated(5), "the column 'more' has the type run_end_encoded"),
    "texts for numbers": ("num_positions", pa.array(["x"] * 5), "'num_positions' has the type string, expected whole"),
    "numbers for texts": ("document_id", numbers(*[1] * 5), "'document_id' has the type int32, expected texts"),
    "no length": ("num_positions", numbers(3, None, 3, 3, 3), "the column 'num_positions' has no value in row 1"),
    "no number of tokens": ("num_tokens", numbers(*[None] * 5), "the column 'num_tokens' has no value in row 0"),
    "a negative length": ("num_positions", numbers(-5, 3, 3, 3, 3), "has a num_positions of -5"),
    "long sequences": (
        "num_positions",
        numbers(*[10**9] * 5),
        "num_positions that adds up to 5000000000, the",
    ),
    "long in tokens": (
        "num_tokens",
        numbers(*[10**9] * 5),
        "has a num_tokens that adds up to 5000000000, the",
    ),
    "other sequences": ("sequence", pa.array([0, 1, 2, 4, 3]), "has sequences that are not numbered from 0 on"),
    "no number": (
        "teacher_loss",
        pa.array([1.0, float("nan"), 1.0, 1.0, 1.0], pa.float32()),
        "the column 'teacher_loss' is not a number in row 1",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_no_reader_may_use(case, copy):
    name, column, words = TABLES[case]
    table = load_table(Folder(str(copy)), open_cache(str(copy)).manifest.shards[0])
    wrong = changed(table, name, column.column if isinstance(column, At) else column)
    data = column.written(wrong, name) if isinstance(column, At) else layout.table_to_ipc(wrong)
    replace_object(copy, "sequences", data)
    place = rf"shard 0, field sequences, file sequences/000000-\w+\.arrow.*{words}"
    cache = open_cache(str(copy))
    for use in (cache.sequence_table, lambda: cache.sequence_table([name]), lambda: cache.metadata(0)):
        with pytest.raises(CorruptCacheError, match=place):
            use()
    agree(copy)
    assert verify_cache(str(copy), progress=False).ok  # hashes are right
    [problem] = verify_cache(str(copy), deep=True, progress=False).problems
    if name == "sequence":  # numbered anew in a part
        return
    assert words.replace("\\", "") in problem
    with pytest.raises(CorruptCacheError, match=place):
        pull_cache(str(copy), str(copy.parent / "part"), shards=[0], progress=False)


def test_lengths_that_are_not_those_of_the_tokens(copy):
    table = load_table(Folder(str(copy)), open_cache(str(copy)).manifest.shards[0])
    lengths = table["num_positions"].to_pylist()
    first, second = next((a, b) for a in range(5) for b in range(5) if lengths[a] != lengths[b])
    lengths[first], lengths[second] = lengths[second], lengths[first]
    replace_object(copy, "sequences", layout.table_to_ipc(changed(table, "num_positions", numbers(*lengths))))
    problems = verify_cache(str(copy), deep=True, progress=False).problems
    assert any(f"sequence {min(first, second)}: num_positions of the per-sequence table" in text for text in problems)


def test_a_table_of_a_few_kilobytes_for_gigabytes(copy, forbid_large_arrays):
    table = load_table(Folder(str(copy)), open_cache(str(copy)).manifest.shards[0])
    small = layout.table_to_ipc(changed(table, "big", pa.array(["a" * (64 << 20), *[""] * 4], pa.large_string())))
    replace_object(copy, "sequences", small)
    assert len(small) < 64 << 10
    cache = open_cache(str(copy), max_decoded_bytes="50MB")
    with pytest.raises(CacheError, match=r"field sequences, file .* takes 67,1\d\d,\d\d\d bytes in memory, more than"):
        cache.sequence_table(["sequence"])
    assert len(open_cache(str(copy)).sequences["big"]) == 13
    # Every row of a dictionary's column has a text of its own once it is used.
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 5, pa.int32()), pa.array(["a" * (20 << 20)]))
    replace_object(copy, "sequences", layout.table_to_ipc(changed(table, "big", texts)))
    with pytest.raises(CacheError, match=r"takes 104,857,600 bytes in memory, more than the limit of 50,000,000"):
        open_cache(str(copy), max_decoded_bytes="50MB").sequences.get("big")


def test_nothing_can_be_many_values(copy):
    """Columns of nulls need no bytes at all, whatever their number."""
    many = 10**12
    table = pa.table({"sequence": pa.nulls(5), "x": pa.nulls(5)})
    data = bytearray(layout.table_to_ipc(table))
    place = data.index((5).to_bytes(8, "little"))
    while place >= 0:
        data[place : place + 8] = many.to_bytes(8, "little")
        place = data.find((5).to_bytes(8, "little"))
    replace_object(copy, "sequences", bytes(data))
    with pytest.raises(CorruptCacheError, match=r"has 1000000000000 rows for 5 sequences"):
        open_cache(str(copy)).sequence_table()


def test_a_damaged_table_is_seen_when_its_first_column_is_read(copy):
    record = open_cache(str(copy)).manifest.shards[0].objects["sequences"]
    data = bytearray((copy / record.path).read_bytes())
    table = pa.ipc.open_file(bytes(data)).read_all()
    schema_at = data.index(b"document_id")
    data[schema_at] ^= 1  # the name of another column, which nobody reads here
    data[data.rindex(b"document_id")] ^= 1
    (copy / record.path).write_bytes(data)
    assert pa.ipc.open_file(bytes(data)).read_all().num_rows == table.num_rows
    for use in (lambda cache: cache.lengths_N, lambda cache: cache.metadata(0), lambda cache: cache.sequence_table()):
        with pytest.raises(CorruptCacheError, match=r"shard 0, field sequences, file .* is damaged \(its sha256"):
            use(open_cache(str(copy)))


# ---------------------------------------------------------------------------------------------------- plan.parquet


def write_plan(copy, data: bytes) -> None:
    (copy / "plan.parquet").write_bytes(data)
    change_manifest(copy, lambda manifest: manifest.update(table_sha256=layout.sha256(data)))


PLANS = {
    "garbage": (b"PAR1" + bytes(range(200)) + b"PAR1", "is not a readable table of the plan"),
    "no columns": (pa.table({"x": [1]}), "it has no column 'sequence'"),
    "texts": (pa.table({"sequence": ["a"], "shard": [0]}), "'sequence' has the type string, expected whole numbers"),
    "nulls": (pa.table({"sequence": pa.array([None, 1], pa.int64())}), "'sequence' has no value in row 0"),
    "beyond the cache": (pa.table({"sequence": [13]}), "names sequences that the cache does not have"),
}


@loop("case", list(PLANS))
def test_a_plan_that_no_reader_may_use(case, tmp_path, sound):
    path = tmp_path / case
    shutil.copytree(sound, path)
    made, words = PLANS[case]
    write_plan(path, made if isinstance(made, bytes) else layout.table_to_parquet(made))
    cache = open_cache(str(path))
    for use in (cache.plan_table, lambda: cache.find(document="document 1")):
        with pytest.raises(CorruptCacheError, match=rf"plan\.parquet.*{words}"):
            use()
    assert any(words in problem for problem in verify_cache(str(path), deep=True, progress=False).problems)


def test_a_plan_of_a_few_kilobytes_for_gigabytes(copy):
    buffer = io.BytesIO()
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * (1 << 20)]))
    pq.write_table(
        pa.table({"sequence": [0] * 1000, "document_id": long}), buffer, compression="zstd", store_schema=False
    )
    write_plan(copy, buffer.getvalue())
    assert len(buffer.getvalue()) < 64 << 10
    with pytest.raises(CacheError, match=r"plan\.parquet takes 1,048,576,000 bytes in memory, more than the limit"):
        open_cache(str(copy), max_decoded_bytes="100MB").plan_table()
