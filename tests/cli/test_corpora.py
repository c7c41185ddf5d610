"""Corpora as users have them, on the command line with its bars and warnings."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from kdcache.cache import open_cache


@pytest.fixture
def dump(run, teacher_dir, tmp_path):
    def dump_with(corpus, *more):
        options = ("--max-length", 32, "--device", "cpu", "--top-k", 4)
        return run(
            "dump-teacher", "--teacher", teacher_dir, "--corpus", corpus, "--output", tmp_path / "out", *options, *more
        )

    return dump_with


def test_what_is_left_out_is_said_once_and_the_rest_is_read(dump, tmp_path, caplog):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one two", "html": "<p>"}\n')
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three four"}\n'))
    (folder / "c.csv").write_text("text,day\nfive six,2020-01-01\n")
    (folder / "d.doc").write_text("?")
    (folder / "e.jsonl").symlink_to("/nowhere")
    found = dump(folder, "--leave-out", "html")
    assert found.code == 0, found.err
    assert caplog.text.count("left out of") == 1
    assert "1 .doc, 1 broken link; supported are .txt, .jsonl" in caplog.text
    with open_cache(str(tmp_path / "out")) as cache:
        assert len(cache) == 3
        assert cache.manifest.corpus.metadata_columns == ("day",)
        assert cache.where("day == '2020-01-01'").tolist() == [2]


def test_an_output_inside_its_corpus(run, teacher_dir, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n')
    for words in ("Wrote", "is complete already; nothing was written"):
        found = run(
            "dump-teacher",
            *("--teacher", teacher_dir, "--corpus", tmp_path, "--output", tmp_path / "out", "--max-length", 32),
        )
        assert found.code == 0, found.err
        assert words in found.out


@pytest.mark.parametrize(
    ("name", "content", "more", "words"),
    [
        (
            "a.jsonl",
            {"question": "a b", "answer": "c"},
            ["--column", "target=answer"],
            "task seq2seq-lm does: choose it",
        ),
        ("a.jsonl", {"text": "a b", "n": 1}, ["--leave-out", "m"], "leave_out: the corpus has no column 'm'"),
        ("a.jsonl", {"text": "a b", "t": "\ud83d"}, [], "a.jsonl, line 1 (row 0): field 't' has an unpaired surrogate"),
        ("pipe", None, [], "is a pipe or a device, and a corpus is read more than once"),
    ],
)
def test_mistakes_name_what_to_do(dump, tmp_path, name, content, more, words):
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(content) + "\n")
    assert words in dump(tmp_path / name, *more).message()
    assert not (tmp_path / "out").exists()
