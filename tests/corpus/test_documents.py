from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.config import build
from kdcache.corpus import TEXT, CorpusConfig, Role, load_corpus
from kdcache.errors import ConfigError, CorpusError

from .conftest import ids, texts, write_json

TRICKY = "\n a\r\nb\rc  \n\n\x0bd\u2028e \u00e9\U0001f600\x00\n\n"


def test_a_text_file_is_one_document_with_exactly_its_content(tmp_path, load):
    (tmp_path / "a.txt").write_bytes(TRICKY.encode())
    corpus = load(tmp_path / "a.txt")
    assert (ids(corpus), texts(corpus)) == (["a.txt"], [TRICKY])
    assert corpus[0].metadata == {}


def test_a_byte_order_mark_is_no_text(tmp_path, load):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n')
    assert texts(load(tmp_path / "a.txt")) == ["one\n\ntwo"]
    assert texts(load(tmp_path / "a.txt", split_text="line")) == ["one", "", "two"]
    assert texts(load(tmp_path / "a.txt", split_text="paragraph")) == ["one", "two"]
    assert texts(load(tmp_path / "b.jsonl")) == ["three"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines(tmp_path, load, end):
    (tmp_path / "a.txt").write_bytes(end.join(["one", "", " two\rthree ", "é"]).encode())
    (tmp_path / "b.txt").write_bytes(f"four{end}".encode())
    corpus = load(tmp_path, split_text="line")
    assert texts(corpus) == ["one", "", " two\rthree ", "é", "four"]
    assert ids(corpus) == ["a.txt:0", "a.txt:1", "a.txt:2", "a.txt:3", "b.txt:0"]


def test_lines_of_a_file_longer_than_a_block(tmp_path, load, monkeypatch):
    monkeypatch.setattr("kdcache.corpus.text_files._BLOCK_BYTES", 7)
    lines = [f"line {i}" * (i % 5) for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    assert texts(load(tmp_path, split_text="line")) == lines


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_paragraphs(tmp_path, load, end):
    text = f"{end}{end}  one{end}more{end}{end} \t{end}{end}  two{end}  {end}three{end}{end}   "
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = load(tmp_path, split_text="paragraph")
    assert texts(corpus) == [f"  one{end}more", "  two", "three"]
    assert ids(corpus) == ["a.txt:0", "a.txt:1", "a.txt:2"]


@pytest.mark.parametrize("blank", ["", "\n", "  \n \n", "\ufeff"])
def test_a_file_without_paragraphs(tmp_path, load, blank):
    (tmp_path / "a.txt").write_text(blank)
    with pytest.raises(CorpusError, match="no documents"):
        load(tmp_path, split_text="paragraph")


def test_json_lines(tmp_path, load):
    write_json(tmp_path / "a.jsonl", {"text": TRICKY, "id": "x", "n": 1}, {"text": None}, {"id": "z", "n": 3})
    corpus = load(tmp_path / "a.jsonl")
    assert len(corpus) == 3
    assert ids(corpus) == ["a.jsonl:0", "a.jsonl:1", "a.jsonl:2"]
    assert texts(corpus) == [TRICKY, "", ""]
    assert corpus.metadata_columns == ("id", "n")
    assert corpus[0].metadata == {"id": "x", "n": 1}
    assert corpus[-1].metadata == {"id": "z", "n": 3}


def test_other_spellings_of_json(tmp_path, load):
    rows = [{"text": "a"}, {"text": "b"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.json").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "d.NDJSON").write_text(lines.replace("\n", "\n\n"))
    (tmp_path / "e.jsonl").write_text(" \n")
    (tmp_path / "f.jsonl").write_text("")
    corpus = load(tmp_path)
    assert texts(corpus) == ["a", "b"] * 3
    assert ids(corpus)[-1] == "d.NDJSON:1"


def test_parquet(tmp_path, load):
    table = pa.table({"n": pa.array([1, 2], pa.int8()), "body": pa.array(["a\r\n", None], pa.large_string())})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = load(tmp_path / "a.parquet", text_field="body")
    assert texts(corpus) == ["a\r\n", ""]
    assert corpus.metadata_table([1, 0, 1]).to_pydict() == {"n": [2, 1, 2]}
    assert corpus.metadata_table([0]).schema.field("n").type == pa.int8()


def test_a_parquet_file_without_rows(tmp_path, load):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    write_json(tmp_path / "b.jsonl", {"text": "b"})
    assert texts(load(tmp_path)) == ["b"]


def test_a_directory_is_read_recursively_in_sorted_order(tmp_path, load):
    for name in ("b/2.jsonl", "b/10.jsonl", "a/z.jsonl", "c.jsonl"):
        write_json(tmp_path / name, {"text": name})
    (tmp_path / "README.md").write_text("no document")
    (tmp_path / ".hidden.txt").write_text("no document")
    corpus = load(tmp_path)
    assert texts(corpus) == ["a/z.jsonl", "b/10.jsonl", "b/2.jsonl", "c.jsonl"]
    assert ids(corpus) == [f"{name}:0" for name in texts(corpus)]


def test_patterns_and_the_order_of_paths(tmp_path, load):
    for name in ("x/a.jsonl", "x/y/b.jsonl", "x/c.txt"):
        write_json(tmp_path / name, {"text": name})
    assert ids(load(tmp_path / "x" / "*.jsonl")) == ["a.jsonl:0"]
    assert ids(load(tmp_path / "**" / "*.jsonl")) == ["a.jsonl:0", "y/b.jsonl:0"]
    assert ids(load(tmp_path / "x/y/b.jsonl", tmp_path / "x/a.jsonl")) == ["y/b.jsonl:0", "a.jsonl:0"]


def test_names_with_special_characters_are_names(tmp_path, load):
    write_json(tmp_path / "d[1]" / "a[b]*?.jsonl", {"text": "x"})
    assert ids(load(tmp_path / "d[1]")) == ["a[b]*?.jsonl:0"]
    assert texts(load(tmp_path / "d[1]" / "a[b]*?.jsonl")) == ["x"]


def test_paths_may_be_relative(tmp_path, load, monkeypatch):
    write_json(tmp_path / "a.jsonl", {"text": "x"})
    monkeypatch.chdir(tmp_path)
    assert ids(load("a.jsonl")) == ids(load("*.jsonl")) == ids(load(".")) == ["a.jsonl:0"]


def test_ids_and_fingerprint_survive_moving(tmp_path, load):
    write_json(tmp_path / "here/a.jsonl", {"text": "a"}, {"text": "b"})
    (tmp_path / "here/sub").mkdir()
    (tmp_path / "here/sub/c.txt").write_text("c")
    before = load(tmp_path / "here")
    before_ids, before_fingerprint = ids(before), before.fingerprint
    shutil.move(tmp_path / "here", tmp_path / "there")
    after = load(tmp_path / "there")
    assert (ids(after), after.fingerprint) == (before_ids, before_fingerprint)
    assert before_ids == ["a.jsonl:0", "a.jsonl:1", "sub/c.txt"]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_a_limit_keeps_the_first_documents_and_their_ids(tmp_path, load, limit):
    write_json(tmp_path / "sub/a.jsonl", {"text": "a"}, {"text": "b"}, {"text": "c"})
    (tmp_path / "z.txt").write_text("z")
    everything = load(tmp_path)
    corpus = load(tmp_path, limit_documents=limit)
    assert ids(corpus) == ids(everything)[:limit]
    assert texts(corpus) == texts(everything)[:limit]
    assert len(corpus.metadata_table(range(len(corpus)))) == len(corpus) == min(limit, 4)


def test_a_limit_leaves_later_sources_alone(tmp_path, load):
    write_json(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.jsonl").write_text("broken")
    assert len(load(tmp_path, limit_documents=1)) == 1


def test_batches_cross_files_and_equal_random_access(tmp_path, load):
    for name in "abc":
        write_json(tmp_path / f"{name}.jsonl", *({"text": f"{name}{i}", name: i} for i in range(3)))
    corpus = load(tmp_path)
    batches = list(corpus.iter_batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert [document for batch in batches for document in batch] == [corpus[i] for i in range(9)] == list(corpus)
    with pytest.raises(IndexError):
        corpus[9]


def test_a_batch_of_texts_has_a_bounded_number_of_characters(tmp_path, load, monkeypatch):
    monkeypatch.setattr("kdcache.corpus.documents._BATCH_CHARACTERS", 10)
    lengths = [4, 6, 1, 25, 0, 9, 1, 1]
    write_json(tmp_path / "a.jsonl", *({"text": "x" * n} for n in lengths[:4]))
    for number, length in enumerate(lengths[4:]):
        (tmp_path / f"b{number}.txt").write_text("y" * length)
    found = list(load(tmp_path).iter_texts(100))
    assert [[len(text) for text in batch] for _, batch in found] == [[4, 6], [1], [25], [0, 9, 1], [1]]
    assert [start for start, _ in found] == [0, 2, 3, 4, 7]
    assert [text for _, batch in found for text in batch] == texts(load(tmp_path))
    assert [len(batch) for _, batch in load(tmp_path).iter_texts(2)] == [2, 1, 1, 2, 2]


def test_large_files_are_not_read_before_their_batch(tmp_path, load, monkeypatch):
    monkeypatch.setattr("kdcache.corpus.documents._BATCH_CHARACTERS", 10)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x" * 8)
    batches = load(tmp_path).iter_texts(256)
    assert next(batches) == (0, ["x" * 8])
    (tmp_path / "4.txt").unlink()
    assert [start for start, _ in (next(batches), next(batches))] == [1, 2]
    with pytest.raises(CorpusError, match=r"cannot read .*4\.txt"):
        list(batches)


def test_a_text_file_that_is_too_large_for_one_document_is_refused(tmp_path, load):
    path = tmp_path / "large.txt"
    path.write_text("one\ntwo\n")
    os.truncate(path, (64 << 20) + 1)  # a hole, which takes no room
    with pytest.raises(CorpusError, match=r"large\.txt has 67,108,865 bytes.*--split-text line"):
        load(path)
    os.truncate(path, 64 << 20)
    assert len(load(path)) == 1


def test_rows_without_a_text_are_told_of(tmp_path, load, caplog):
    write_json(tmp_path / "a.jsonl", {"text": "a"}, {"text": ""})
    write_json(tmp_path / "b.jsonl", {"text": "b"}, {"txt": "c"}, {"text": None})
    write_json(tmp_path / "c.jsonl", {"text": None})
    pq.write_table(pa.table({"text": ["d", None]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("")
    assert texts(load(tmp_path)) == ["a", "", "b", "", "", "", "d", "", ""]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "4 documents have no 'text' (null or missing) and are counted as empty" in record.getMessage()
    assert "b.jsonl" in record.getMessage()


def test_rows_without_a_text_after_the_limit_are_not_told_of(tmp_path, load, caplog):
    write_json(tmp_path / "a.jsonl", {"text": "a"}, {"text": ""}, {"text": None}, {"text": None})
    load(tmp_path, limit_documents=2)
    assert not caplog.records
    load(tmp_path, limit_documents=3)
    assert "1 document has no 'text' (null or missing) and is counted" in caplog.text


def test_one_path_needs_no_list(tmp_path):
    assert build(CorpusConfig, {"paths": "texts.jsonl"}).paths == ("texts.jsonl",)


def test_metadata_is_the_union_of_columns(tmp_path, load):
    write_json(tmp_path / "a.jsonl", {"text": "a", "year": 2020, "tag": 1, "deep": {"x": 1}})
    write_json(tmp_path / "b.jsonl", {"text": "b", "tag": "s", "new": True})
    write_json(tmp_path / "c.jsonl", {"text": "c", "year": 1.5})
    (tmp_path / "d.txt").write_text("d")
    corpus = load(tmp_path)
    assert corpus.metadata_columns == ("year", "tag", "deep", "new")
    assert corpus.metadata_table([3, 2, 1, 0]).to_pydict() == {
        "year": [None, 1.5, None, 2020.0],
        "tag": [None, None, "s", "1"],
        "deep": [None, None, None, {"x": 1}],
        "new": [None, None, True, None],
    }
    assert corpus.metadata_table([]).column_names == ["year", "tag", "deep", "new"]


def test_metadata_that_mixes_types_does_not_touch_the_text(tmp_path, load):
    write_json(tmp_path / "a.jsonl", {"text": "a", "m": 1}, {"text": "b", "m": "s"}, {"text": "c", "m": {"x": 1}})
    corpus = load(tmp_path)
    assert texts(corpus) == ["a", "b", "c"]
    assert len(corpus.metadata_table([0, 1, 2])) == 3


def test_a_corpus_without_metadata(tmp_path, load):
    write_json(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    corpus = load(tmp_path)
    assert corpus.metadata_columns == ()
    assert corpus.metadata_table([1, 0, 0]).shape == (3, 0)


def test_the_fingerprint_sees_every_change(tmp_path, load):
    def fingerprint(name: str, *rows: dict) -> str:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        write_json(tmp_path / "c" / name, *rows)
        return load(tmp_path / "c").fingerprint

    variants = [
        ("a.jsonl", {"text": "ab"}, {"text": "c"}),
        ("a.jsonl", {"text": "a"}, {"text": "bc"}),
        ("a.jsonl", {"text": "ab"}, {"text": "c "}),
        ("a.jsonl", {"text": "c"}, {"text": "ab"}),
        ("a.jsonl", {"text": "ab"}, {"text": "c"}, {"text": ""}),
        ("b.jsonl", {"text": "ab"}, {"text": "c"}),
    ]
    found = [fingerprint(*variant) for variant in variants]
    assert len(set(found)) == len(variants)
    assert fingerprint("a.jsonl", {"text": "ab", "n": 1}, {"text": "c"}) == found[0]


def digest_of(documents: list[list[str]]) -> str:
    """The fingerprint of documents, each an id, a text and perhaps the JSON of its further columns."""
    parts = [part.encode() for document in documents for part in document]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


def test_the_first_complete_pass_computes_the_fingerprint(tmp_path, monkeypatch):
    rows = [{"text": f"text {number}", "label": number % 2, "n": 5} for number in range(7)]
    write_json(tmp_path / "a.jsonl", *rows)
    roles = {"plain": (TEXT,), "labelled": (TEXT, Role("label"))}
    for name, given in roles.items():
        corpus = load_corpus(CorpusConfig(paths=(str(tmp_path),)), given)
        more = [[json.dumps({"label": row["label"]})] if name == "labelled" else [] for row in rows]
        expected = digest_of([[f"a.jsonl:{n}", row["text"], *more[n]] for n, row in enumerate(rows)])
        assert load_corpus(CorpusConfig(paths=(str(tmp_path),)), given).fingerprint == expected, "a pass of its own"
        assert next(corpus.iter_rows(2))[0] == 0, "a pass that ends early leaves nothing behind"
        assert sum(len(batch) for _, batch in corpus.iter_rows(2)) == 7
        monkeypatch.setattr(corpus, "iter_texts", None)
        assert corpus.fingerprint == expected


def test_a_configuration_that_is_written_and_read_again_means_the_same(tmp_path):
    write_json(tmp_path / "a.jsonl", {"source": "a", "target": "b"})
    write_json(tmp_path / "b.jsonl", {"body": "a", "target": "b"})
    roles = (Role("source"), Role("target"))
    for name, settings in (
        ("a.jsonl", {}),
        ("b.jsonl", {"text_field": "body"}),
        ("b.jsonl", {"columns": {"source": "body"}}),
    ):
        config = CorpusConfig(paths=(str(tmp_path / name),), **settings)
        for again in (
            config,
            CorpusConfig(**config.model_dump()),
            CorpusConfig.model_validate_json(config.model_dump_json()),
        ):
            assert texts(load_corpus(again, roles)) == ["a"]
            assert load_corpus(again, roles).text_field == ("source" if name == "a.jsonl" else "body")


def test_progress_bars_of_the_library_are_left_as_they_were(tmp_path, load, capfd):
    import datasets

    write_json(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.jsonl").write_text('{"text": 1')
    datasets.enable_progress_bars()
    with pytest.raises(CorpusError):
        load(tmp_path)
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"bad\.jsonl, line 3, column 13 is not valid JSON"),
        (b'{"text": "\xff"\n', r"bad\.jsonl, line 1 is not UTF-8: byte 0xff"),
        (b'{"text": "a"}\n\n{"text": 5}\n', r"bad\.jsonl, line 3 \(row 1\): field 'text' must be a string.*number 5"),
        (b'{"text": 5}\n{"text": 6}\n', r"line 1 \(row 0\): field 'text' must be a string"),
        (b'{"text": null}\n{"text": ["a"]}\n', r"line 2 \(row 1\): field 'text' must be a string, found a list"),
        (b'{"text": "a"}\n"b"\n', r"line 2 \(row 1\): expected a JSON object.*found a string"),
        (b'{"text": "a\\ud800"}\n', r"line 1 \(row 0\): field 'text' has an unpaired surrogate"),
        (b'[{"text": "a"},\n {"text": 5}]', r"item 1 \(row 1\): field 'text' must be a string"),
        (b'[{"text": "a"},\n {"text": }]', r"line 2, column 11 is not valid JSON"),
    ],
)
def test_broken_json_names_the_line(tmp_path, load, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load(tmp_path)


def test_a_late_number_among_texts_is_found_behind_the_first_block(tmp_path, load):
    rows = [{"text": "x" * 100_000} for _ in range(120)]
    write_json(tmp_path / "big.jsonl", *rows, {"text": 5}, {"text": "y"})
    with pytest.raises(CorpusError, match=r"line 121 \(row 120\)"):
        load(tmp_path)


@pytest.mark.parametrize("late", [["2024-01-01"], ["2024-01-01", "2024-01-02T00:00:00"], [None, "2024-01-01"]])
def test_late_texts_that_look_like_dates_stay_as_they_are(tmp_path, load, late):
    # 105 rows of 100 kB fill the first batch of 10 MiB, so that the late rows are alone in the second.
    rows = [{"text": "x" * 100_000} for _ in range(105)]
    write_json(tmp_path / "big.jsonl", *rows, *({"text": text} for text in late))
    assert load(tmp_path).texts(105, 105 + len(late)) == [text or "" for text in late]


@pytest.mark.parametrize("late", [5, {"a": 1}, True, ["a"]])
def test_late_texts_that_are_no_strings_are_found(tmp_path, load, late):
    rows = [{"text": "x" * 100_000} for _ in range(105)]
    write_json(tmp_path / "big.jsonl", *rows, {"text": late})
    with pytest.raises(CorpusError, match=r"line 106 \(row 105\): field 'text' must be a string"):
        load(tmp_path)


def test_texts_that_all_look_like_dates_are_read_as_they_are(tmp_path, load):
    write_json(tmp_path / "a.jsonl", {"text": "2024-01-01"}, {"text": "2024-01-02"})
    assert texts(load(tmp_path)) == ["2024-01-01", "2024-01-02"]


def test_a_missing_field_suggests_a_column(tmp_path, load):
    path = write_json(tmp_path / "a.jsonl", {"text": "a", "n": 1})
    with pytest.raises(CorpusError, match=r"a\.jsonl has no field 'txet'; did you mean 'text'\? columns: text, n; cho"):
        load(path, text_field="txet")
    with pytest.raises(CorpusError, match=r"has no field 'body'; known: n, text; choose with --text-field"):
        load(path, text_field="body")


def test_a_parquet_text_must_be_a_string(tmp_path, load):
    pq.write_table(pa.table({"text": [None, 7]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet, row 1: field 'text' must be a string, found int64"):
        load(tmp_path)


def test_a_broken_parquet_file_is_named(tmp_path, load):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(CorpusError, match=r"cannot read .*a\.parquet as parquet"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["file", "line", "paragraph"])
def test_text_that_is_not_utf8_is_named(tmp_path, load, split):
    (tmp_path / "a.txt").write_bytes(b"good\n\nbad \xe9\n")
    with pytest.raises(CorpusError, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 10"):
        texts(load(tmp_path, split_text=split))


def test_tables_that_are_not_utf8_are_named(tmp_path, load):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good", "m": ""}\n{"text": "bad", "m": "\xff"}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2 is not UTF-8: byte 0xff"):
        load(tmp_path)
    (tmp_path / "a.jsonl").unlink()

    def column(*values: bytes) -> pa.Array:
        return pa.Array.from_buffers(pa.string(), 2, pa.array(values, pa.binary()).buffers())

    table = pa.table({"text": column(b"good", b"bad \xff"), "m": column(b"\xff", b"")})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = load(tmp_path)
    assert corpus.texts(0, 1) == ["good"]
    with pytest.raises(CorpusError, match=r"a\.parquet, row 1: field 'text' is not UTF-8"):
        corpus.texts(0, 2)
    with pytest.raises(CorpusError, match=r"a\.parquet, rows 0 to 1: field 'm' is not UTF-8"):
        corpus.metadata_table([0, 1])


def test_paths_that_lead_nowhere(tmp_path, load):
    (tmp_path / "a.doc").write_text("text")
    with pytest.raises(CorpusError, match=r"none\.jsonl does not exist"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(CorpusError, match=r"a\.doc: unsupported kind of file; supported are \.txt, \.jsonl.*\.parquet"):
        load(tmp_path / "a.doc")
    with pytest.raises(CorpusError, match=r"directory .* has no supported file; supported are"):
        load(tmp_path)
    with pytest.raises(CorpusError, match=r"pattern .*\*\.jsonl' has no supported file"):
        load(tmp_path / "*.jsonl")


def test_a_file_may_be_named_once_only(tmp_path, load):
    path = write_json(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(CorpusError, match=r"a\.jsonl is named twice"):
        load(tmp_path, path)


def test_a_file_that_disappears_is_named(tmp_path, load):
    path = tmp_path / "a.txt"
    path.write_text("a")
    corpus = load(path)
    path.unlink()
    with pytest.raises(CorpusError, match=r"cannot read .*a\.txt"):
        corpus[0]


def test_an_empty_corpus_is_refused(tmp_path, load):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(CorpusError, match="has no documents"):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"paths": []}, {"paths": ["a"], "limit_documents": 0}, {"paths": ["a"], "split_text": "word"}]
)
def test_settings_are_checked(settings):
    with pytest.raises(ConfigError):
        build(CorpusConfig, settings)


# ---------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("path", "asked", "first_id"),
    [
        ("hf:org/name", ("org/name", None, "train"), "hf:org/name@train:0"),
        ("hf:org/name:en", ("org/name", "en", "train"), "hf:org/name:en@train:0"),
        ("hf:org/name:en@test", ("org/name", "en", "test"), "hf:org/name:en@test:0"),
    ],
)
def test_hub_data_sets(hub, load, path, asked, first_id):
    corpus = load(path)
    (name, config), options = hub[0]
    assert (name, config, options["split"]) == asked
    assert (ids(corpus)[0], texts(corpus), corpus.metadata_columns) == (first_id, ["a", "b"], ("n",))


def test_hub_data_sets_have_the_same_checks(hub, load):
    with pytest.raises(CorpusError, match=r"hf:x@train has no field 'txt'; did you mean 'text'\?"):
        load("hf:x", text_field="txt")
    with pytest.raises(CorpusError, match=r"hf:x@train, row 0: field 'n' must be a string"):
        load("hf:x", text_field="n")
    with pytest.raises(CorpusError, match="names no data set"):
        load("hf:@train")
    with pytest.raises(CorpusError, match="hf:x@train is named twice"):
        load("hf:x", "hf:x@train")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "cannot load hf:x@train from the .*: no route.*network.*HF_HUB_OFFLINE"),
        (ValueError('Unknown split "train"'), "cannot load hf:x@train .*Unknown split"),
    ],
)
def test_an_unreachable_hub_is_explained(monkeypatch, load, error, message):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(CorpusError, match=message):
        load("hf:x")


def test_files_and_hub_sets_mix(hub, tmp_path, load):
    (tmp_path / "a.txt").write_text("file")
    corpus = load("hf:x", Path(tmp_path / "a.txt"))
    assert ids(corpus) == ["hf:x@train:0", "hf:x@train:1", "a.txt"]
    assert corpus.metadata_table([2, 0]).to_pydict() == {"n": [None, 1]}
