from __future__ import annotations

import logging

import pytest
import transformers
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer

from kdcache.errors import ConfigError
from kdcache.models.tokenizer import TextEncoder, describe_difference, tokenizer_record
from tests.loops import loop
from tests.tiny import SENTENCES, bpe_tokenizer, word_tokenizer


def template(tokenizer, single):
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def test_record_counts_added_tokens_and_special_ids():
    tokenizer = bpe_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    record = tokenizer_record(tokenizer)
    assert record.vocab_size == size + 1
    assert (record.bos_id, record.eos_id, record.pad_id) == (0, 1, None)


def test_record_survives_saving_and_loading(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path / "somewhere")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "somewhere")
    assert tokenizer_record(loaded) == tokenizer_record(tokenizer)
    assert describe_difference(loaded, tokenizer) == []


def test_use_does_not_change_identity():
    tokenizer = bpe_tokenizer()
    before = tokenizer_record(tokenizer).sha256
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(SENTENCES, padding=True, truncation=True, max_length=4)
    tokenizer.backend_tokenizer.enable_padding(pad_id=1, length=8)
    assert tokenizer_record(tokenizer).sha256 == before


def test_another_eos_or_bos_among_the_same_ids_does_not_change_identity():
    ours, other = bpe_tokenizer(), bpe_tokenizer(eos_token="<s>", bos_token="</s>")
    assert tokenizer_record(ours).sha256 == tokenizer_record(other).sha256
    assert tokenizer_record(other).eos_id == 0
    assert describe_difference(ours, other) == []


@loop(
    ("changed", "words"),
    [
        (lambda: bpe_tokenizer(vocab_size=300), "vocabulary size 290 against 300"),
        (lambda: bpe_tokenizer(lowercase=True), "normaliser differs"),
        (lambda: word_tokenizer(["x"]), "id 0 is '<s>' against '<unk>'"),
    ],
)
def test_differences_are_told_in_words(changed, words):
    ours, other = bpe_tokenizer(), changed()
    assert words in describe_difference(ours, other)
    assert tokenizer_record(ours).sha256 != tokenizer_record(other).sha256


def test_same_size_other_words():
    differences = describe_difference(word_tokenizer(["x", "y"]), word_tokenizer(["y", "x"]))
    assert differences == ["id 3 is 'x' against 'y'"]


def test_other_merges_with_equal_vocabulary():
    a, b = bpe_tokenizer(), bpe_tokenizer()
    import json

    from tokenizers import Tokenizer

    state = json.loads(b.backend_tokenizer.to_str())
    state["model"]["merges"].reverse()
    b._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert describe_difference(a, b) == ["model or merges differs"]


def test_tokenizer_without_backend_is_described_by_vocabulary_and_says_so(caplog):
    class Slow:
        bos_token_id = eos_token_id = pad_token_id = bos_token = eos_token = None

        def get_vocab(self):
            return {"a": 0, "b": 7}

    with caplog.at_level(logging.WARNING):
        record = tokenizer_record(Slow())
    assert record.vocab_size == 8
    assert "Slow has no tokenizers backend" in caplog.text
    assert describe_difference(Slow(), Slow()) == []
    assert describe_difference(Slow(), bpe_tokenizer())


def test_encoder_gives_what_the_tokenizer_gives_and_ignores_its_limits(recwarn, caplog):
    tokenizer = bpe_tokenizer(model_max_length=4)
    expected = [tokenizer(text, verbose=False)["input_ids"] for text in SENTENCES]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    assert TextEncoder(tokenizer).encode([*SENTENCES, ""]) == [*expected, []]
    assert tokenizer.backend_tokenizer.truncation is not None, "the tokenizer itself is left as it was"
    assert "longer than" not in caplog.text
    assert TextEncoder(tokenizer).encode([]) == []


def test_bos_only_where_texts_really_begin_with_it():
    unused = TextEncoder(bpe_tokenizer())
    assert (unused.bos_id, unused.eos_id, unused.appends_eos) == (None, 1, False)
    used = TextEncoder(template(bpe_tokenizer(), "<s> $A"))
    assert (used.bos_id, used.eos_id, used.appends_eos) == (0, 1, False)
    assert used.encode(["the"])[0][0] == 0


def test_eos_added_by_the_tokenizer_itself():
    tokenizer = template(bpe_tokenizer(), "$A </s>")
    tokenizer.eos_token = None
    encoder = TextEncoder(tokenizer)
    assert (encoder.bos_id, encoder.eos_id, encoder.appends_eos) == (None, 1, True)
    assert encoder.encode(["the"])[0][-1] == 1


# What stands around a text, and what stands in it.


def letters(letters: str, single: str, pair: str = "$A $B", **special: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that knows some letters and nothing else, as those of DNA do."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.BPE({name: n for n, name in enumerate([*names, *letters])}, []))
    known = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=known)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", mask_token="[MASK]", **special
    )


DNA = {"letters": "ACGTN", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def test_special_tokens_around_a_text_of_an_alphabet_that_has_no_usual_word():
    encoder = TextEncoder(letters(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", **DNA))
    assert encoder.around(1) == [[1], [2]]
    assert encoder.around(2) == [[1], [2], [2]]
    assert encoder.pair_types
    assert (encoder.bos_id, encoder.eos_id, encoder.appends_eos) == (1, 2, True)
    assert encoder.treats_targets_alike
    assert encoder.encode(["ACGT"]) == [[1, 4, 5, 6, 7, 2]]


def test_a_first_token_alone():
    encoder = TextEncoder(letters("ACGTN", "[CLS] $A", bos_token="[CLS]", eos_token="[SEP]"))
    assert encoder.around(1) == [[1], []]
    assert (encoder.bos_id, encoder.eos_id, encoder.appends_eos) == (1, 2, False)


def test_a_tokenizer_that_gives_no_text_a_token_is_refused():
    with pytest.raises(ConfigError, match="before and after a text cannot be told"):
        TextEncoder(letters("", "[CLS] $A [SEP]"))


def test_texts_that_begin_with_the_first_token_themselves_are_counted():
    tokenizer = letters("ACGTN", "[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")
    encoder = TextEncoder(tokenizer)
    assert encoder.special_tokens_seen("help") == []
    encoder.encode(["[CLS]AC", "ACG", "A[SEP]C", "[SEP]", "[CLS]"])
    encoder.encode_plain(["[CLS]T"])
    doubled, written = encoder.special_tokens_seen("help")
    assert "begin with [CLS], as chat templates write it: 3 of 6." in doubled
    assert doubled.endswith("; help")
    assert "texts with [SEP] written out: 2 of 6." in written
    plain = TextEncoder(tokenizer, add_special_tokens=False)
    assert plain.encode(["[CLS]AC"]) == [[1, 4, 5]]
    assert (plain.bos_id, plain.appends_eos, plain.around(1), plain.around(2)) == (None, False, [[], []], [[], [], []])
    assert plain.special_tokens_seen("help") == []
