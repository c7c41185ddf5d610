"""What a dump makes of its corpus on the way from the command line: outputs, columns, other caches, large metadata."""

from __future__ import annotations

import json

import pytest

from kdcache.cache import open_cache
from kdcache.dump import dump_teacher
from kdcache.errors import CacheError, CorpusError
from kdcache.transcode import TranscodeConfig, transcode_cache
from kdcache.verify.stored import verify_cache

from .fake import BigramTeacher, run_dump
from .test_dump_teacher import config_for


def written(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_output_inside_the_corpus_is_resumed_by_the_same_call(tmp_path, teacher_dir):
    written(tmp_path / "d/a.jsonl", {"text": "one two three"})
    config = config_for(teacher_dir, tmp_path / "d", tmp_path / "d/cache")
    first = dump_teacher(config, progress=False)
    again = dump_teacher(config, progress=False)
    assert (first.num_shards_written, again.num_shards_written) == (1, 0)
    assert again.manifest.corpus.num_documents == 1


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([{"text": "one two"}], {}, "corpus.num_documents is 2 there and 1 here"),
        ([{"text": "one two", "n": 1}, {"text": "other", "n": 2}], {}, "corpus.fingerprint is"),
        (None, {"sequences": {"max_length": 9}}, "sequences.max_length is 16 there and 9 here"),
        (None, {"targets": {"top_k": 5, "codec": "exact"}}, "targets.top_k is 6 there and 5 here"),
        (None, {"targets": {"kind": "sampled"}}, "targets.kind is 'top-k' there and 'sampled' here"),
        (None, {"corpus": {"leave_out": ["n"]}}, r"corpus.metadata_columns is \['n'\] there and \[\] here"),
    ],
)
def test_another_cache_is_refused_before_anything_is_tokenised(
    tmp_path, teacher_dir, monkeypatch, rows, changes, words
):
    path = written(tmp_path / "a.jsonl", {"text": "one two", "n": 1}, {"text": "three four", "n": 2})
    settings = {"sequences": {"max_length": 16}}
    dump_teacher(config_for(teacher_dir, path, tmp_path / "cache", **settings), progress=False)
    if rows is not None:
        written(path, *rows)
    monkeypatch.setattr("kdcache.models.tokenizer.TextEncoder.encode", None)
    settings |= {**changes, "corpus": {"paths": [str(path)], **changes.get("corpus", {})}}
    with pytest.raises(CacheError, match=f"holds another cache: .*{words}"):
        dump_teacher(config_for(teacher_dir, path, tmp_path / "cache", **settings), progress=False)


def test_a_column_of_another_task_names_that_task(tmp_path, teacher_dir):
    path = written(tmp_path / "a.jsonl", {"question": "one two", "answer": "three"})
    corpus = {"paths": [str(path)], "columns": {"text": "question", "target": "answer"}}
    with pytest.raises(
        CorpusError, match="task causal-lm reads no 'target', but text; task seq2seq-lm does: choose it with --task"
    ):
        dump_teacher(config_for(teacher_dir, path, tmp_path / "cache", corpus=corpus), progress=False)
    corpus["columns"] = {"txet": "question"}
    with pytest.raises(CorpusError, match="reads no 'txet', but text; did you mean 'text'"):
        dump_teacher(config_for(teacher_dir, path, tmp_path / "cache", corpus=corpus), progress=False)


def test_large_metadata_is_stored_once_per_document(tmp_path, monkeypatch):
    rows = [
        {"text": "ab" * 400, "html": "<p>" * 999},
        *({"text": "abc", "html": f"{n}"} for n in range(60)),
        {"text": "x" * 99},
    ]
    path = written(tmp_path / "a.jsonl", *rows)
    run_dump(path, tmp_path / "plain", BigramTeacher())
    monkeypatch.setattr("kdcache.corpus.documents._MOST_REPEATED_BYTES", 10_000)
    run_dump(path, tmp_path / "once", BigramTeacher())
    transcode_cache(TranscodeConfig(source=str(tmp_path / "once"), output=str(tmp_path / "again")), progress=False)
    with open_cache(str(tmp_path / "plain")) as plain:
        for name in ("once", "again"):
            assert verify_cache(str(tmp_path / name), deep=True).problems == []
            with open_cache(str(tmp_path / name)) as cache:
                assert cache.sequence_table().to_pydict() == plain.sequence_table().to_pydict()
                assert cache.metadata(3) == plain.metadata(3)
                assert "dictionary" in str(cache.sequences.schema.field("html").type)
                for condition in ("html == '7'", "html != '7'", "html in ['7', '9']"):
                    assert cache.where(condition).tolist() == plain.where(condition).tolist() != [], condition
