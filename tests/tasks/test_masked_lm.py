from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.config import build
from kdcache.corpus import CorpusConfig, load_corpus
from kdcache.dump import dump_teacher
from kdcache.errors import ConfigError, CorpusError
from kdcache.models.tokenizer import TextEncoder
from kdcache.tasks import task_of
from kdcache.tasks.masked_lm import MaskingSettings
from tests.task_models import SENTENCES, TINY_TASKS, WORDS, bert_tokenizer, dump_config

TASK = task_of("masked-lm")
TOKENIZER = bert_tokenizer()
PAD, UNK, CLS, SEP, MASK = range(5)


def plan(path: Path, texts: list[str], tokenizer: Any = TOKENIZER, name: str = "c.jsonl", **settings: Any) -> Any:
    (path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = load_corpus(CorpusConfig(paths=(str(path),)))
    return TASK.plan(corpus, TextEncoder(tokenizer), build(MaskingSettings, settings), None)


def all_of(sequences: Any) -> list[Any]:
    return [sequences.sequence(n) for n in range(sequences.num_sequences)]


def restored(sequence: Any) -> list[int]:
    """The tokens with the hidden ones put back."""
    tokens = sequence.tokens_T.copy()
    tokens[sequence.token_index_L] = sequence.labels_L
    return tokens.tolist()


def test_labels_and_places_give_the_text_back(tmp_path):
    for sequence, text in zip(all_of(plan(tmp_path, SENTENCES, mask_prob=0.4)), SENTENCES, strict=True):
        assert restored(sequence) == TOKENIZER(text)["input_ids"]
        assert 0 < len(sequence.token_index_L) == len(sequence.labels_L) == sequence.num_positions
        assert (np.diff(sequence.token_index_L.astype(int)) > 0).all()


def test_of_the_chosen_tokens_80_percent_are_hidden_10_random_10_kept(tmp_path):
    long = " ".join(np.random.default_rng(0).choice(WORDS.split(), 40_000))
    sequences = all_of(plan(tmp_path, [long], max_length=1000))
    fed = np.concatenate([s.tokens_T[s.token_index_L] for s in sequences]).astype(int)
    labels = np.concatenate([s.labels_L for s in sequences])
    assert abs(len(labels) / 40_000 - 0.15) < 0.01  # five standard deviations are 0.009
    assert abs((fed == MASK).mean() - 0.8) < 0.027
    # A random id is by chance the right one as often as there are words.
    num_words = len(WORDS.split())
    assert abs((fed == labels).mean() - (0.1 + 0.1 / num_words)) < 0.021
    is_random = (fed != MASK) & (fed != labels)
    assert set(fed[is_random]) == set(range(5, 5 + num_words)), "every word is drawn, no special token is"
    others = np.concatenate([np.delete(s.tokens_T, s.token_index_L) for s in sequences])
    assert MASK not in others


@pytest.mark.parametrize(("random_share", "kept_share", "fed"), [(0.0, 0.0, "mask"), (0.0, 0.5, "mask or label")])
def test_shares_are_settings(tmp_path, random_share, kept_share, fed):
    for s in all_of(plan(tmp_path, SENTENCES, mask_prob=0.9, random_share=random_share, kept_share=kept_share)):
        tokens = s.tokens_T[s.token_index_L]
        is_kept = tokens == s.labels_L
        assert (is_kept | (tokens == MASK)).all()
        assert not is_kept.any() or fed == "mask or label"


def test_special_tokens_are_never_chosen_not_even_in_the_text(tmp_path):
    text = "the [MASK] cat [SEP] dog zzz [CLS] [PAD] mat"
    for sequence in all_of(plan(tmp_path, [text] * 40, mask_prob=0.9)):
        assert not set(sequence.labels_L.tolist()) & {PAD, UNK, CLS, SEP, MASK}
        assert sequence.tokens_T[0] == CLS
        assert sequence.tokens_T[-1] == SEP


def test_a_text_of_unknown_words_has_nothing_to_learn(tmp_path):
    sequences = plan(tmp_path, ["zzz qqq", "the cat", "", "   "])
    assert sequences.num_sequences == 1
    assert (sequences.num_empty, sequences.num_too_short) == (1, 2)
    with pytest.raises(CorpusError, match=r"no document of .* can be used"):
        plan(tmp_path, ["zzz qqq"])


def test_a_single_word_has_one_row(tmp_path):
    [sequence] = all_of(plan(tmp_path, ["cat"], mask_prob=0.01))
    assert sequence.token_index_L.tolist() == [1]
    assert sequence.labels_L.tolist() == TOKENIZER("cat", add_special_tokens=False)["input_ids"]


def test_long_documents_become_pieces_each_with_special_tokens(tmp_path):
    text = " ".join(WORDS.split()[:20])
    sequences = plan(tmp_path, [text], max_length=10)
    pieces = all_of(sequences)
    assert [len(piece.tokens_T) for piece in pieces] == [10, 10, 6]
    assert all(piece.tokens_T[[0, -1]].tolist() == [CLS, SEP] for piece in pieces)
    plain = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert [token for piece in pieces for token in restored(piece)[1:-1]] == plain
    assert sequences.table()["token_offset"].to_pylist() == [0, 8, 16]


def test_masks_do_not_depend_on_the_rest_of_the_corpus(tmp_path):
    alone = all_of(plan(tmp_path, SENTENCES))
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jsonl").write_text(json.dumps({"text": "the dog ran"}) + "\n")
    among = all_of(plan(other, [*SENTENCES, "the red moon"]))
    for mine, theirs in zip(alone, among[1:-1], strict=True):
        assert mine.tokens_T.tolist() == theirs.tokens_T.tolist()
        assert mine.token_index_L.tolist() == theirs.token_index_L.tolist()


def test_replicas_differ_and_the_first_stays_the_same(tmp_path):
    settings = {"mask_prob": 0.4, "max_length": 12}
    once = plan(tmp_path, SENTENCES, **settings)
    thrice = plan(tmp_path, SENTENCES, replicas=3, **settings)
    assert thrice.num_sequences == 3 * once.num_sequences
    ids = thrice.table()["sequence_id"].to_pylist()
    assert ids[:3] == [f"{once.table()['sequence_id'][0]}#{n}" for n in range(3)]
    replicas = all_of(thrice)
    for n, first in enumerate(all_of(once)):
        mine = replicas[3 * n : 3 * n + 3]
        assert mine[0].tokens_T.tolist() == first.tokens_T.tolist()
        assert restored(mine[0]) == restored(mine[1]) == restored(mine[2])
    different = [
        replicas[3 * n].token_index_L.tolist() != replicas[3 * n + 1].token_index_L.tolist()
        for n in range(len(ids) // 3)
    ]
    assert np.mean(different) > 0.7


def test_another_seed_draws_other_masks(tmp_path):
    first, second = (all_of(plan(tmp_path, SENTENCES, seed=seed)) for seed in (0, 1))
    assert any(a.tokens_T.tolist() != b.tokens_T.tolist() for a, b in zip(first, second, strict=True))


def test_rows_are_the_chosen_places_of_the_padded_grid(tmp_path):
    sequences = all_of(plan(tmp_path, SENTENCES, mask_prob=0.4))
    batch = TASK.pad_batch(sequences, PAD)
    longest = max(len(s.tokens_T) for s in sequences)
    assert batch["input_ids"].shape == (len(sequences), longest)
    expected = np.concatenate([s.tokens_T[s.token_index_L] for s in sequences])
    np.testing.assert_array_equal(batch["input_ids"].reshape(-1)[batch["rows"]], expected)
    assert batch["attention_mask"].sum() == sum(len(s.tokens_T) for s in sequences)


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path):
    tokenizer = bert_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        plan(tmp_path, SENTENCES, tokenizer)


def test_two_dumps_give_the_same_bytes(tmp_path):
    found = TINY_TASKS["masked-lm"].write(tmp_path)
    files = []
    for name in ("first", "second"):
        dump_teacher(dump_config("masked-lm", found, tmp_path / name), progress=False)
        # A shard's name ends with the attempt that wrote it.
        paths = sorted((tmp_path / name).rglob("*.zip"))
        files.append([path.read_bytes() for path in paths])
    assert len(files[0]) > 1
    assert files[0] == files[1]
