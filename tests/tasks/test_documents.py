from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.corpus import Corpus, CorpusConfig, load_corpus
from kdcache.errors import CorpusError
from kdcache.tasks import TaskSettings
from kdcache.tasks.documents import BuiltSequence, build_sequences, joined, shorten
from tests.task_models import bert_tokenizer


def corpus_of(path: Path, *texts: str) -> Corpus:
    (path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return load_corpus(CorpusConfig(paths=(str(path / "c.jsonl"),)))


def words(num: int) -> str:
    return " ".join(["cat"] * num)


def test_shorten_is_the_tokenizers_longest_first():
    tokenizer = bert_tokenizer()
    backend = tokenizer.backend_tokenizer
    for first in range(1, 10):
        for second in range(1, 10):
            for max_length in range(5, 16):
                backend.enable_truncation(max_length, strategy="longest_first")
                expected = backend.encode(words(first), words(second))
                parts = shorten([[7] * first, [8] * second], max_length - 3)
                assert [len(part) for part in parts] == [
                    sum(n == part for n in expected.sequence_ids) for part in (0, 1)
                ], (first, second, max_length)


@pytest.mark.parametrize(("length", "room", "left"), [(3, 5, 3), (5, 5, 5), (9, 5, 5)])
def test_shorten_cuts_a_single_text_at_its_end(length, room, left):
    assert shorten([list(range(length))], room) == [list(range(left))]


def test_shorten_is_quick_on_two_books():
    parts = shorten([list(range(3_000_000)), list(range(3_000_000))], 509)
    assert [len(part) for part in parts] == [254, 255]
    assert parts[0] == list(range(254))


def test_joined_puts_special_tokens_into_the_part_before_them():
    tokens, segments = joined([[10, 11], [20]], [[1], [2, 3], [4]])
    assert tokens.tolist() == [1, 10, 11, 2, 3, 20, 4]
    assert segments.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_joined_is_what_a_bert_tokenizer_makes_of_a_pair():
    expected = bert_tokenizer()("the cat", "a dog ran", return_token_type_ids=True)
    plain = [bert_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in ("the cat", "a dog ran")]
    tokens, segments = joined(plain, [[2], [3], [3]])
    assert tokens.tolist() == expected["input_ids"]
    assert segments.tolist() == expected["token_type_ids"]


def made_of(start: int, rows: list[tuple[str, dict[str, Any]]]) -> Any:
    """Two sequences of each text, none of one that is too short; tokens say which document they are of."""
    for number, (text, _) in enumerate(rows):
        tokens = np.full(len(text), start + number, np.uint32)
        if len(text) > 1:
            yield [BuiltSequence(tokens, num_rows=1), BuiltSequence(tokens[1:], num_rows=1, token_offset=1)]
        else:
            yield []


def test_sequences_are_those_of_all_documents_in_order(tmp_path):
    texts = ["" if n % 7 == 0 else "x" * (1 + n % 5) for n in range(600)]
    sequences = build_sequences(corpus_of(tmp_path, *texts), TaskSettings(), made_of)
    long = [n for n, text in enumerate(texts) if len(text) > 1]
    assert sequences.num_sequences == 2 * len(long)
    assert sequences.num_empty == texts.count("")
    assert sequences.num_too_short == texts.count("x")
    assert sequences.num_empty + sequences.num_too_short + len(long) == len(texts) == sequences.num_documents
    assert sequences.num_tokens == sum(2 * len(texts[n]) - 1 for n in long)
    for place, document in enumerate(long):
        first, second = (sequences.sequence(2 * place + n).tokens_T.tolist() for n in (0, 1))
        assert first == [document] * len(texts[document])
        assert second == first[1:]
    table = sequences.table()
    assert table["document"].to_pylist() == [n for n in long for _ in (0, 1)]
    assert table["token_offset"].to_pylist() == [0, 1] * len(long)
    assert len(set(table["sequence_id"].to_pylist())) == sequences.num_sequences


def test_a_corpus_without_a_usable_document_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"no document of .*c\.jsonl can be used: 1 are empty and 2 too short"):
        build_sequences(corpus_of(tmp_path, "", "x", "y"), TaskSettings(), made_of)


def test_a_number_beyond_the_last_sequence_is_refused(tmp_path):
    sequences = build_sequences(corpus_of(tmp_path, "xx"), TaskSettings(), made_of)
    with pytest.raises(IndexError, match="sequence 2 does not exist; there are 0 to 1"):
        sequences.sequence(2)
