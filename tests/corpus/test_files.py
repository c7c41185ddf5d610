"""Values stay what they are in the file, and every file counts once, whatever its type, name, time and compression."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.corpus import TEXT, CorpusConfig, Role, load_corpus
from kdcache.errors import CorpusError

from .conftest import ids, texts, write_json


def metadata(corpus):
    return corpus.metadata_table(range(len(corpus))).to_pydict()


# ------------------------------------------------------------------------------------------------ what is in a column


@pytest.mark.parametrize(
    ("first", "last", "column"),
    [
        ({}, {"opt": 1}, [None, 1]),
        ({"opt": None}, {"opt": "s"}, [None, "s"]),
        ({"opt": 1}, {"opt": 2.5}, [1.0, 2.5]),
        ({"opt": "2020-01-01"}, {"opt": "no date"}, ["2020-01-01", "no date"]),
        ({"opt": {"a": 1}}, {"opt": {"b": "x"}}, [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
        ({"opt": []}, {"opt": [1, 2]}, [[], [1, 2]]),
    ],
)
def test_a_late_column_is_read_behind_ten_megabytes(tmp_path, load, first, last, column):
    rows = [{"text": f"t {n}", "pad": "x" * 100_000, **first} for n in range(110)]
    write_json(tmp_path / "a.jsonl", *rows, {"text": "last", "pad": "", **last})
    corpus = load(tmp_path)
    assert corpus.texts(109, 111) == ["t 109", "last"]
    assert corpus.metadata_table([0, 110])["opt"].to_pylist() == column


STRINGS = ["2020-03-05", "2020-03-05T10:00:00Z", "12", "1e3", "true", "null", "", "NaN", " 7 "]


def test_strings_stay_strings_in_every_column(tmp_path, load):
    rows = [{"text": text, "date": text, "many": [text], "deep": {"x": text}} for text in STRINGS]
    roles = (TEXT, Role("target"), Role("documents", False))
    for columns in ({"target": "date", "documents": "many"}, {"target": "deep"}):
        corpus = load_corpus(
            CorpusConfig(paths=(str(write_json(tmp_path / "a.jsonl", *rows)),), columns=columns), roles
        )
        [(_, found)] = corpus.iter_rows(100)
        assert [text for text, _ in found] == STRINGS
        name = columns["target"]
        assert [more["target"] for _, more in found] == [row[name] for row in rows]
    assert metadata(load(tmp_path))["date"] == STRINGS


def test_numbers_stay_exact(tmp_path, load):
    values = {"int": [1, 2], "wide": [2**53 + 1, 0.5], "huge": [2**70, 1], "real": [1, 0.1], "bool": [True, 1]}
    write_json(tmp_path / "a.jsonl", *({"text": "a", **{k: v[n] for k, v in values.items()}} for n in range(2)))
    assert metadata(load(tmp_path)) == {
        "int": [1, 2],
        "wide": ["9007199254740993", "0.5"],
        "huge": ["1180591620717411303424", "1"],
        "real": [1.0, 0.1],
        "bool": ["true", "1"],
    }
    roles = (TEXT, *(Role(name) for name in values))
    [(_, rows)] = load_corpus(CorpusConfig(paths=(str(tmp_path),)), roles).iter_rows(9)
    found = {name: [more[name] for _, more in rows] for name in values}
    assert repr(found) == repr({**values, "real": [1.0, 0.1]})


def test_objects_without_members_are_kept(tmp_path, load):
    write_json(tmp_path / "a.jsonl", {"text": "a", "m": {}}, {"text": "b", "m": {"x": {}}})
    assert metadata(load(tmp_path)) == {"m": ["{}", '{"x": {}}']}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "b", "title": "x \\ud83d"}', r"line 2 \(row 1\): field 'title' has an unpaired surrogate"),
        (b'{"text": "b", "m": [{"x": "\\ude00"}]}', r"line 2 \(row 1\): field 'm' has an unpaired surrogate"),
        (b'{"text": "b", "\\ud83d": 1}', r"line 2 \(row 1\): field '\\ud83d' has an unpaired surrogate"),
        (b'{"text": "b", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2 nests lists or objects too deeply"),
        (b'{"text": "b", "m": ' + b"9" * 5000 + b"}", "line 2 has a number of too many digits"),
        (b'{"text": "b", "m": "\xff"}', "line 2 is not UTF-8: byte 0xff"),
    ],
)
def test_what_cannot_be_read_in_any_column_is_named(tmp_path, load, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a \\ud83d\\ude00"}\n' + line + b"\n")
    with pytest.raises(CorpusError, match=rf"a\.jsonl, {message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [('[{"text": "a"} {', "line 1, column 16.*Expecting ','"), ('[{"text": "a"}]\n x', "line 2, column 2.*Extra data")],
)
def test_arrays_that_do_not_end_well_are_named(tmp_path, load, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CorpusError, match=message):
        load(tmp_path)


def test_a_column_can_be_left_out(tmp_path, load):
    path = write_json(tmp_path / "a.jsonl", {"text": "a", "html": "<p>", "n": 1})
    corpus = load(path, leave_out=("html",))
    assert (corpus.metadata_columns, corpus[0].metadata) == (("n",), {"n": 1})
    assert corpus.fingerprint == load(path).fingerprint
    with pytest.raises(CorpusError, match=r"has no column 'htlm'; did you mean 'html'\?"):
        load(path, leave_out=("htlm",))


# ------------------------------------------------------------------------------------------------------------ Parquet


def test_parquet_columns_of_every_type_are_kept_or_become_texts(tmp_path, load):
    table = pa.table(
        {
            "text": pa.array(["a", "b"]).dictionary_encode(),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
            "day": pa.array([1, None], pa.date32()),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "bytes": pa.array([b"\xff", b""]),
            "many": pa.array([[[1]], []], pa.list_(pa.field("element", pa.list_(pa.field("element", pa.int8()))))),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = load(tmp_path)
    assert texts(corpus) == ["a", "b"]
    found = metadata(corpus)
    assert found["map"] == ['{"k": 1}', "[]"]
    assert (found["kind"], found["bytes"]) == (["x", "y"], [b"\xff", b""])
    assert found["many"] == [[[1]], []]
    schema = corpus.metadata_table([0]).schema
    assert schema.field("day").type == pa.date32()
    assert str(schema.field("many").type) == "list<item: list<item: int8>>"


def test_two_columns_of_one_name_are_named(tmp_path, load):
    columns = [pa.array(["a b"]), pa.array([1]), pa.array([1])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "x", "x"]), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet has two columns called 'x'; give them different names"):
        load(tmp_path)
    (tmp_path / "b.csv").write_text("text,x,x\n1,2,3\n")
    with pytest.raises(CorpusError, match=r"b\.csv, line 1 has two columns called 'x'"):
        load(tmp_path / "b.csv")


def test_rows_of_parquet_are_found_in_any_order(tmp_path, load, monkeypatch):
    monkeypatch.setattr("kdcache.corpus.parquet_files._MOST_ROWS", 3)
    rows = [{"text": f"t{n}" if n % 5 else None, "n": n} for n in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    corpus = load(tmp_path)
    expected = [row["text"] or "" for row in rows]
    assert [text for _, batch in corpus.iter_texts(4) for text in batch] == expected
    for start, stop in ((0, 50), (48, 50), (10, 30), (3, 4), (20, 25), (26, 27), (45, 46)):
        assert corpus.texts(start, stop) == expected[start:stop]
    for order in ([49, 0, 7, 7, 21], [13, 14], [30, 2, 48], list(range(50))):
        assert corpus.metadata_table(order)["n"].to_pylist() == order


@pytest.mark.parametrize("statistics", [True, False])
def test_missing_texts_of_parquet_are_counted(tmp_path, load, caplog, statistics):
    rows = [{"text": "t" if n % 5 else None} for n in range(50)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7, write_statistics=statistics)
    load(tmp_path, limit_documents=33)
    assert "7 documents have no 'text'" in caplog.text


# ---------------------------------------------------------------------------------------------------------------- CSV


def test_csv_is_read_exactly(tmp_path, load):
    long = "x" * 200_000
    lines = ["text,n,day", '"a ""b"", c\r\nd\n",007,2020-01-01', "", f"{long},,1e3", "é,1, "]
    for end in ("\n", "\r\n"):
        (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + (end.join(lines) + end).encode())
        corpus = load(tmp_path)
        assert texts(corpus) == ['a "b", c\r\nd\n', long, "é"]
        assert metadata(corpus) == {"n": ["007", None, "1"], "day": ["2020-01-01", "1e3", " "]}
        assert corpus.texts(1, 2) == [long]
    (tmp_path / "a.csv").unlink()
    (tmp_path / "b.TSV").write_text("n\ttext\n1\ta,b")
    assert texts(load(tmp_path)) == ["a,b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,n\na,1\nb\n", "line 3 has 1 values, and line 1 names 2 columns"),
        ('text,n\na,1\n"b"c,2\n', "line 3: not a table of values separated by ','"),
        ('text,n\n"a,1\n', "line 2: not a table of values separated by ','"),
        ("text;n\na;1\n", "line 1: expected names of columns separated by ',', found 'text;n'"),
        ("body,n\na,1\n", "has no field 'text'"),
    ],
)
def test_csv_that_cannot_be_read_exactly_is_named(tmp_path, load, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(CorpusError, match=rf"a\.csv,? {message}"):
        load(tmp_path / "a.csv")


# -------------------------------------------------------------------------------------------------------- compression


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKED = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("extension", PACKED)
def test_compressed_files_are_read_as_the_files_in_them(tmp_path, load, extension):
    names = {
        "a.jsonl": b'\xef\xbb\xbf{"text": "one", "n": 1}\n\n{"text": "two", "n": 2}\n',
        "b.json": b'[{"text": "three"}, {"text": "four"}]',
        "c.csv": b"text,n\nfive,5\n",
        "d.txt": b"\xef\xbb\xbfsix\r\n\r\nseven",
        "e.jsonl": b"",
    }
    for name, content in names.items():
        (tmp_path / "plain" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(content)
        (tmp_path / "packed" / (name + extension)).write_bytes(PACKED[extension](content) if content else b"")
    for split in ("file", "line", "paragraph"):
        plain, packed = (load(tmp_path / kind, split_text=split) for kind in ("plain", "packed"))
        assert texts(plain) == texts(packed)
        assert metadata(plain) == metadata(packed)
        assert [id_.replace(extension, "") for id_ in ids(packed)] == ids(plain)
    assert texts(load(tmp_path / "packed" / f"d.txt{extension}", split_text="line")) == ["six", "", "seven"]


@pytest.mark.parametrize("extension", PACKED)
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"nonsense" * 9])
def test_damaged_compressed_files_are_named(tmp_path, load, extension, damage):
    data = PACKED[extension](json.dumps({"text": "abc" * 99}).encode())
    (tmp_path / f"a.jsonl{extension}").write_bytes(damage(data))
    with pytest.raises(CorpusError, match=rf"cannot decompress .*a\.jsonl\{extension}"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ which files there are


def test_a_file_that_changed_under_its_name_and_time_is_read_anew(tmp_path, load):
    for name in ("a.jsonl", "a.parquet"):
        for text in ("old", "new", "longer text"):
            path = tmp_path / name
            if name == "a.jsonl":
                write_json(path, {"text": text})
            else:
                pq.write_table(pa.table({"text": [text]}), path)
            os.utime(path, (1_700_000_000, 1_700_000_000))
            assert texts(load(path)) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, load, name):
    path = tmp_path / name

    def write(text):
        if name == "a.parquet":
            pq.write_table(pa.table({"text": [text]}), path)
        else:
            path.write_text(json.dumps({"text": text}))

    write("a")
    corpus = load(path)
    write("another")
    with pytest.raises(CorpusError, match=rf"{name} has changed since the corpus was opened"):
        corpus.texts(0, 1)


def test_every_file_counts_once_however_it_is_linked(tmp_path, load, caplog):
    write_json(tmp_path / "d/sub/a.jsonl", {"text": "a"})
    write_json(tmp_path / "elsewhere/b.jsonl", {"text": "b"})
    before = load(tmp_path / "d", tmp_path / "elsewhere").fingerprint
    (tmp_path / "d/sub/up").symlink_to("..")
    (tmp_path / "d/also").symlink_to("sub")
    (tmp_path / "d/sub/Link.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path / "d/sub/a.jsonl", tmp_path / "d/sub/hard.jsonl")
    assert ids(load(tmp_path / "d")) == ids(load(tmp_path / "d/**/*.jsonl")) == ids(load(f"{tmp_path}/*/*/a.jsonl"))
    assert ids(load(tmp_path / "d")) == ["a.jsonl:0"]
    assert "2 further names" in caplog.text
    assert load(tmp_path / "d", tmp_path / "elsewhere").fingerprint == before
    (tmp_path / "d/out").symlink_to(tmp_path / "elsewhere")
    assert ids(load(tmp_path / "d")) == ["out/b.jsonl:0", "sub/a.jsonl:0"]
    with pytest.raises(CorpusError, match=r"Link\.jsonl is named twice .*also as .*a\.jsonl; name every file once"):
        load(tmp_path / "d/sub/a.jsonl", tmp_path / "d/sub/Link.jsonl")


def test_many_links_between_folders_take_no_time(tmp_path, load):
    folders = [tmp_path / f"{n:02}" for n in range(20)]
    for folder in folders:
        write_json(folder / "a.jsonl", {"text": folder.name})
    for folder in folders:
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    for path in (tmp_path, tmp_path / "**"):
        assert len(load(path)) == 20


def test_what_is_left_out_is_counted_in_one_warning(tmp_path, load, caplog):
    write_json(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}\n'))
    for name in ("c.md", "d.MD", "e", "f.parquet.gz", ".hidden", "numbers.csv"):
        (tmp_path / name).write_text("x,y\n1,2\n")
    (tmp_path / "g.jsonl").symlink_to("/nowhere")
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "sub/pipe.jsonl")
    assert texts(load(tmp_path)) == ["a", "b"]
    [record] = caplog.records
    wanted = (
        "1 .csv or .tsv without a column 'text', 1 .gz, 2 .md, 1 broken link, 1 hidden name, 1 special file, 1 without"
    )
    assert wanted in record.getMessage()
    caplog.clear()
    assert texts(load(tmp_path / "*")) == ["a", "b"]
    [record] = caplog.records
    assert "2 .md, 1 broken link, 1 folder, 1 without an extension" in record.getMessage()


def test_patterns_match_as_those_of_the_shell(tmp_path, load):
    for name in ("x/a.jsonl", "x/y/b.jsonl", "x/y/.h/c.jsonl", "x/.d.jsonl", "[z]/e.jsonl"):
        write_json(tmp_path / name, {"text": Path(name).stem})
    found = {
        "x/**/*.jsonl": ["a", "b"],
        "**/[b]*": ["b"],
        "**": ["e", "a", "b"],
        "**/y/**": ["b"],
        "x/**/.h/*": ["c"],
        "x/.*": [".d"],
        "[[]z]/**/*": ["e"],
    }
    for pattern, stems in found.items():
        assert texts(load(f"{tmp_path}/{pattern}")) == stems, pattern


def test_the_output_and_caches_are_no_corpus(tmp_path):
    write_json(tmp_path / "a.jsonl", {"text": "a"})
    for folder in ("out/commits", "other/tokenizer"):
        write_json(tmp_path / folder / "x.json", {"x": 1})
    for name in ("plan.json", "plan.parquet"):
        (tmp_path / "other" / name).write_text("{}")
    (tmp_path / "link").symlink_to("out")
    for path in (tmp_path, f"{tmp_path}/**"):
        corpus = load_corpus(CorpusConfig(paths=(str(path),)), outputs=[str(tmp_path / "link/../out")])
        assert ids(corpus) == ["a.jsonl:0"]
    write_json(tmp_path / "written.jsonl", {"text": "b"})
    corpus = load_corpus(CorpusConfig(paths=(f"{tmp_path}/*",)), outputs=[tmp_path / "written.jsonl"])
    assert ids(corpus) == ["a.jsonl:0"]
    for inside in ("out", "out/commits", "link/commits/x.json"):
        with pytest.raises(CorpusError, match=r"is \(in\) the output of this command"):
            load_corpus(CorpusConfig(paths=(str(tmp_path / inside),)), outputs=[tmp_path / "out"])


def test_names_that_are_urls_elsewhere_are_names_here(tmp_path, load):
    for name in ("a::b/x.jsonl", "zip://y/x.jsonl"):
        write_json(tmp_path / name, {"text": name})
        assert texts(load(tmp_path / name)) == [name]


def test_pipes_and_links_to_nothing_are_named(tmp_path, load):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/null"):
        with pytest.raises(CorpusError, match="is a pipe or a device, and a corpus is read more than once"):
            load(path)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"b\.jsonl is a link to .*nowhere, which does not exist"):
        load(tmp_path / "b.jsonl")


def test_files_need_no_cache_of_hugging_face(tmp_path, load, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nope")
    write_json(tmp_path / "a.jsonl", {"text": "a"})
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "b.parquet")
    assert texts(load(tmp_path)) == ["a", "b"]


# ------------------------------------------------------------------------------------------------------ large metadata


def test_large_metadata_is_held_once_per_document(tmp_path, load, monkeypatch):
    write_json(tmp_path / "a.jsonl", {"text": "a", "html": "x" * 1000, "n": 1}, {"text": "b", "html": None, "n": 2})
    corpus = load(tmp_path)
    rows = [0, 0, 1, 0]
    whole = corpus.metadata_table(rows)
    monkeypatch.setattr("kdcache.corpus.documents._MOST_REPEATED_BYTES", 2999)
    once = corpus.metadata_table(rows)
    assert once.to_pydict() == whole.to_pydict()
    assert once.schema.field("html").type == pa.dictionary(pa.int32(), pa.string())
    assert once.nbytes < 1200 < 3000 < whole.nbytes
    assert once.schema.field("n") == whole.schema.field("n")
    assert corpus.metadata_table([0, 1]).schema == whole.schema


def test_metadata_that_is_too_large_names_its_column(tmp_path, load, monkeypatch):
    monkeypatch.setattr("kdcache.corpus.documents._repeated_bytes", lambda *_: 0)
    path = write_json(tmp_path / "a.jsonl", {"text": "a", "html": "x" * (1 << 20)})
    with pytest.raises(CorpusError, match=r"column 'html' is too large.*--leave-out html"):
        load(path).metadata_table([0] * 2048)
