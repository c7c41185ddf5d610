from __future__ import annotations

import gc
import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.config import build
from kdcache.corpus import CorpusConfig, SequenceConfig, assign_shards, plan_sequences
from kdcache.corpus.documents import Corpus
from kdcache.errors import ConfigError, CorpusError
from kdcache.schema import token_hash

from .conftest import ByteEncoder, write_json


class Texts:
    """Rows of a list, as a source of a corpus."""

    name = "list"
    is_single = False
    metadata_schema = pa.schema([])

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self.num_rows = len(texts)

    def texts(self, start, stop):
        return self._texts[start:stop]

    def metadata(self, rows):
        raise AssertionError("not asked for without columns")


def plan(texts: list[str], encoder: ByteEncoder | None = None, **settings):
    corpus = Corpus(CorpusConfig(paths=("list",)), [("list", Texts(texts))])
    return plan_sequences(corpus, encoder or ByteEncoder(), SequenceConfig(**settings))


def tokens(plan) -> list[list[int]]:
    return [plan.sequence(i).tokens_T.tolist() for i in range(plan.num_sequences)]


def targets(plan) -> list[int]:
    """The tokens that are learnt, over all sequences in order."""
    found: list[int] = []
    for index in range(plan.num_sequences):
        sequence = plan.sequence(index)
        found += sequence.tokens_T[1:][sequence.loss_mask_L == 1].tolist()
    return found


def letters(text: str) -> list[int]:
    return list(text.encode())


def test_a_document_is_cut_with_one_shared_token():
    found = plan(["abcdefg", "hi"], max_length=3)
    assert tokens(found) == [letters("abcd"), letters("defg"), letters("hi")]
    assert [found.sequence(i).loss_mask_L.tolist() for i in range(3)] == [[1, 1, 1], [1, 1, 1], [1]]
    assert found.lengths_N.tolist() == [3, 3, 1]
    assert found.lengths_N.dtype == np.int64
    assert (found.num_sequences, found.num_positions, found.num_tokens) == (3, 7, 10)
    assert found.sequence(0).segment_ids_T is None
    assert found.sequence(0).tokens_T.dtype == np.uint32


def test_continuations_begin_with_bos_where_the_tokenizer_has_one():
    found = plan(["abcdefgh"], ByteEncoder(bos=True), max_length=3)
    bos = 1000
    assert tokens(found) == [
        [bos, *letters("abc")],
        [bos, *letters("cde")],
        [bos, *letters("efg")],
        [bos, *letters("gh")],
    ]
    assert [found.sequence(i).loss_mask_L.tolist() for i in range(4)] == [[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1]]
    assert found.table()["token_offset"].to_pylist() == [0, 3, 5, 7]
    assert found.table()["num_tokens"].to_pylist() == [4, 3, 3, 2]
    assert found.sequence_table(0, 4)["num_tokens"].to_pylist() == [4, 4, 4, 3]


def test_windows_hold_many_documents_and_mask_their_first_tokens():
    found = plan(["abc", "de", "fghijk"], max_length=4, packing="window")
    assert tokens(found) == [letters("abcde"), letters("efghi"), letters("ijk")]
    assert [found.sequence(i).loss_mask_L.tolist() for i in range(3)] == [[1, 1, 0, 1], [0, 1, 1, 1], [1, 1]]
    assert [found.sequence(i).segment_ids_T.tolist() for i in range(3)] == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0]]
    assert found.sequence(0).segment_ids_T.dtype == np.uint16
    assert found.sequence_table(0, 3)["num_documents"].to_pylist() == [2, 2, 1]


def test_windows_that_attend_across_documents_learn_everything():
    found = plan(["abc", "de", "f", "gh"], max_length=4, packing="window", attend_across_documents=True)
    assert targets(found) == letters("bcdegh")
    assert found.sequence(0).segment_ids_T is None


def test_a_window_may_end_exactly_with_the_stream():
    assert tokens(plan(["abc", "de"], max_length=4, packing="window")) == [letters("abcde")]
    assert tokens(plan(["abc", "def"], max_length=4, packing="window")) == [letters("abcde"), letters("ef")]


def test_empty_and_short_documents_are_counted():
    found = plan(["", "ab", "x", " ", "", "  "], max_length=4)
    assert (found.num_documents, found.num_empty, found.num_too_short) == (6, 2, 2)
    assert tokens(found) == [letters("ab"), letters("  ")]
    assert found.table()["document"].to_pylist() == [1, 5]


def test_an_empty_text_with_bos_is_still_empty():
    found = plan(["", "a"], ByteEncoder(bos=True))
    assert (found.num_empty, found.num_too_short, found.num_sequences) == (1, 0, 1)


def test_eos_ends_every_document_once():
    found = plan(["a", "bc", ""], append_eos=True)
    assert tokens(found) == [[97, 1001], [98, 99, 1001]]

    class WithEos(ByteEncoder):
        def encode(self, texts):
            return [[*ids, 1001] for ids in super().encode(texts)]

    assert tokens(plan(["ab"], WithEos(), append_eos=True)) == [[97, 98, 1001]]


def test_append_eos_needs_an_eos():
    with pytest.raises(ConfigError, match="append_eos needs a tokenizer with an EOS token"):
        plan(["ab"], ByteEncoder(eos=False), append_eos=True)


@pytest.mark.parametrize("texts", [["", ""], ["", "x"]])
def test_a_corpus_without_usable_documents_is_refused(texts):
    with pytest.raises(CorpusError, match=r"no document of list can be used: \d are empty and \d have a single token"):
        plan(texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attend_across_documents": True}, "needs packing=window"),
        ({"packing": "window", "max_length": 70_000}, "max_length up to 65535"),
        ({"max_length": 1}, "max_length"),
        ({"packing": "windows"}, "packing"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(SequenceConfig, settings)


def test_a_sequence_that_does_not_exist():
    with pytest.raises(IndexError, match="sequences 0 to 0, not 1"):
        plan(["ab"]).sequence(1)


# ---------------------------------------------------------------------------------------------------------- properties

# A token occurs once in the whole corpus, so that "exactly once" can be counted.
LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda lengths: max(lengths) > 1)


class Numbered(ByteEncoder):
    """Text "3 10" has the tokens 10, 11, 12."""

    def encode(self, texts):
        prefix = [] if self.bos_id is None else [self.bos_id]
        pairs = [text.split() for text in texts]
        return [prefix + list(range(int(first), int(first) + int(count))) for count, first in pairs]


def numbered(lengths: list[int]) -> list[str]:
    return [f"{count} {2000 + 100 * i}" if count else "" for i, count in enumerate(lengths)]


@given(LENGTHS, st.integers(2, 6), st.booleans())
def test_ragged_sequences_predict_every_token_exactly_once(lengths, max_length, bos):
    encoder = Numbered(bos=bos)
    found = plan(numbered(lengths), encoder, max_length=max_length)
    documents = [ids for ids in encoder.encode([text for text in numbered(lengths) if text]) if len(ids) > 1]
    assert targets(found) == [token for ids in documents for token in ids[1:]]
    assert found.lengths_N.max() <= max_length
    assert found.num_positions == sum(len(ids) - 1 for ids in tokens(found)) == found.num_tokens - found.num_sequences
    assert all(ids[0] == 1000 for ids in tokens(found)) or not bos
    assert found.num_documents == len(documents) + found.num_empty + found.num_too_short
    if not bos:
        expected = sum(-(-(len(ids) - 1) // max_length) for ids in documents)
        assert found.num_sequences == expected


@given(LENGTHS, st.integers(2, 6), st.booleans())
def test_windows_predict_every_token_exactly_once(lengths, max_length, bos):
    encoder = Numbered(bos=bos)
    found = plan(numbered(lengths), encoder, max_length=max_length, packing="window")
    documents = [ids for ids in encoder.encode([text for text in numbered(lengths) if text]) if len(ids) > 1]
    stream = [token for ids in documents for token in ids]
    assert targets(found) == [token for ids in documents for token in ids[1:]]
    assert [ids[0] for ids in tokens(found)][:1] + [t for ids in tokens(found) for t in ids[1:]] == stream
    assert set(found.lengths_N[:-1].tolist()) <= {max_length}
    for index in range(found.num_sequences):
        segments = found.sequence(index).segment_ids_T
        assert segments[0] == 0
        assert set(np.diff(segments).tolist()) <= {0, 1}


@given(LENGTHS, st.integers(2, 6), st.sampled_from(["none", "window"]), st.booleans())
def test_the_table_describes_the_sequences(lengths, max_length, packing, bos):
    texts = numbered(lengths)
    encoder = Numbered(bos=bos)
    found = plan(texts, encoder, max_length=max_length, packing=packing)
    rebuilt: dict[int, list[int]] = {}
    for row in found.table().to_pylist():
        ids = encoder.encode([texts[row["document"]]])[0][row["token_offset"] :][: row["num_tokens"]]
        assert len(ids) == row["num_tokens"] > 0
        assert row["document_id"] == f"list:{row['document']}"
        rebuilt.setdefault(row["sequence"], []).extend(ids)
    for index, ids in enumerate(tokens(found)):
        assert ids in (rebuilt[index], [1000, *rebuilt[index]])
    pieces = Counter(found.table()["sequence"].to_pylist())
    rows = found.sequence_table(0, found.num_sequences).to_pylist()
    assert [row["num_documents"] for row in rows] == [pieces[i] for i in range(found.num_sequences)]
    assert [row["token_hash"] for row in rows] == [
        token_hash(found.sequence(i).tokens_T) for i in range(found.num_sequences)
    ]
    assert [row["num_positions"] for row in rows] == found.lengths_N.tolist()
    assert len({row["sequence_id"] for row in rows}) == found.num_sequences


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 50))
def test_shards_are_the_fewest_sequences_that_reach_the_size(lengths, shard_positions):
    starts = assign_shards(np.array(lengths, np.int64), shard_positions)
    assert starts.dtype == np.int64
    assert (starts[0], starts[-1]) == (0, len(lengths))
    for start, stop in itertools.pairwise(starts.tolist()):
        assert sum(lengths[start : stop - 1]) < shard_positions
        assert stop == len(lengths) or sum(lengths[start:stop]) >= shard_positions


# -------------------------------------------------------------------------------------------------------------- tables


def test_tables_name_documents_and_carry_metadata(tmp_path, load):
    write_json(tmp_path / "a.jsonl", {"text": "abcde", "year": 1, "document_id": "x"}, {"text": "", "year": 2})
    (tmp_path / "b.txt").write_text("fgh")
    corpus = load(tmp_path)
    found = plan_sequences(corpus, ByteEncoder(), SequenceConfig(max_length=2))
    assert found.table().to_pydict() == {
        "sequence": [0, 1, 2],
        "sequence_id": ["a.jsonl:0@0", "a.jsonl:0@2", "b.txt@0"],
        "document": [0, 0, 2],
        "document_id": ["a.jsonl:0", "a.jsonl:0", "b.txt"],
        "token_offset": [0, 2, 0],
        "num_tokens": [3, 3, 3],
    }
    table = found.sequence_table(1, 3)
    assert table.select(["sequence", "sequence_id", "document_id", "year", "corpus_document_id"]).to_pylist() == [
        {"sequence": 1, "sequence_id": "a.jsonl:0@2", "document_id": "a.jsonl:0", "year": 1, "corpus_document_id": "x"},
        {"sequence": 2, "sequence_id": "b.txt@0", "document_id": "b.txt", "year": None, "corpus_document_id": None},
    ]
    assert found.sequence_table(3, 3).schema == table.schema
    packed = plan_sequences(corpus, ByteEncoder(), SequenceConfig(max_length=5, packing="window"))
    assert packed.table()["sequence_id"].to_pylist() == ["window:0", "window:0", "window:1"]
    assert packed.sequence_table(0, 2)["token_offset"].to_pylist() == [0, 0]


def test_types_of_the_tables():
    found = plan(["abc"])
    kinds = {name: str(kind) for name, kind in zip(found.table().schema.names, found.table().schema.types, strict=True)}
    assert kinds == {
        "sequence": "int64",
        "sequence_id": "string",
        "document": "int64",
        "document_id": "string",
        "token_offset": "int64",
        "num_tokens": "int32",
    }


def test_token_hash_is_fixed_for_ever():
    assert token_hash(np.array([1, 2, 70_000], np.uint32)) == token_hash(np.array([1, 2, 70_000], ">u4"))
    assert token_hash(np.array([1, 2, 70_000], np.uint32)) == "13e5abc9176b01c6"


def test_plans_are_deterministic_and_progress_is_told(monkeypatch):
    monkeypatch.setattr("kdcache.corpus.sequences._BATCH_DOCUMENTS", 2)
    corpus = Corpus(CorpusConfig(paths=("list",)), [("list", Texts(["abc", "", "de", "fghi", "x"]))])
    told: list[tuple[int, int]] = []
    config = SequenceConfig(max_length=2)
    first = plan_sequences(corpus, ByteEncoder(), config, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert first.table().equals(plan_sequences(corpus, ByteEncoder(), config).table())


def test_batches_of_characters_change_no_sequence(monkeypatch):
    documents = ["abc", "", "de", "fghijklmnopq", "x", "yz"]
    once = plan(documents, append_eos=True, max_length=4)
    monkeypatch.setattr("kdcache.corpus.documents._BATCH_CHARACTERS", 5)
    asked: list[list[str]] = []

    class Asked(ByteEncoder):
        def encode(self, texts):
            asked.append(texts)
            return super().encode(texts)

    assert tokens(plan(documents, Asked(), append_eos=True, max_length=4)) == tokens(once)
    assert asked == [["abc", "de"], ["fghijklmnopq"], ["x", "yz"]]


def test_no_temporary_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = plan(["abc"])
    assert tokens(found) == [letters("abc")]
    if os.name == "posix":
        assert list(tmp_path.iterdir()) == []
    del found
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_full_temporary_directory_is_explained(monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Full())
    with pytest.raises(CorpusError, match=r"No space left on device; it needs 4 bytes per token .* set TMPDIR"):
        plan(["abc"])


def test_the_corpus_layer_imports_neither_torch_nor_transformers(tmp_path):
    import subprocess
    import sys

    (Path(tmp_path) / "a.jsonl").write_text('{"text": "abc"}\n')
    script = (
        "import sys; from kdcache.corpus import *;"
        f"c = load_corpus(CorpusConfig(paths=({str(tmp_path)!r},))); c.fingerprint;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "HF_HOME": str(tmp_path / ".hf")})
