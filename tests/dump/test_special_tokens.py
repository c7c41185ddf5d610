"""Special tokens around texts and in them, from the corpus to the cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import processors

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.schema import OUTPUTS_FIELD
from tests.models.test_tokenizer import DNA, letters
from tests.task_models import bert
from tests.tiny import bpe_tokenizer, llama


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("bos")
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    for part in (llama(len(tokenizer)), tokenizer):
        part.save_pretrained(path / "teacher")
    texts = ["<s>the cat sat</s>", "the cat", "<s>on the mat"]
    (path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "teacher": {"model": str(path / "teacher"), "device": "cpu"},
        "corpus": {"paths": [str(path / "corpus.jsonl")]},
        "targets": {"top_k": 4},
    }


def test_texts_that_begin_with_bos_are_counted(settings, tmp_path, caplog):
    config = build(DumpConfig, settings | {"output": str(tmp_path), "sequences": {"max_length": 32}})
    dump_teacher(config, progress=False)
    assert "begin with <s>, as chat templates write it: 2 of 3." in caplog.text
    assert "set sequences.add_special_tokens=false, or remove it" in caplog.text
    assert "texts with </s> written out: 1 of 3." in caplog.text
    cache = open_cache(tmp_path)
    assert cache.read([0]).tokens_T[:2].tolist() == [0, 0]
    assert "add_special_tokens" not in cache.manifest.sequences  # as in dumps before there was the setting


def test_a_setting_leaves_the_special_tokens_to_the_texts(settings, tmp_path, caplog):
    chosen = {"max_length": 32, "add_special_tokens": False}
    config = build(DumpConfig, settings | {"output": str(tmp_path), "sequences": chosen})
    dump_teacher(config, progress=False)
    assert not caplog.records
    cache = open_cache(tmp_path)
    starts = [cache.read([n]).tokens_T[:2].tolist() for n in range(3)]
    assert [ids.count(0) for ids in starts] == [1, 0, 1]
    assert starts[0][0] == starts[2][0] == 0
    assert cache.manifest.sequences["add_special_tokens"] is False
    assert dump_teacher(config, progress=False).num_shards_written == 0  # the same plan


def test_a_teacher_of_an_alphabet_is_fed_what_its_tokenizer_makes(tmp_path):
    tokenizer = letters(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", **DNA)
    model = bert("BertForSequenceClassification", vocab_size=9, num_labels=3).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    rows = [{"text": "ACGTACGT"}, {"text": "TTGA", "text_pair": "CAT"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "output": str(tmp_path / "cache"),
        "task": "sequence-classification",
        "teacher": {"model": str(tmp_path / "teacher"), "device": "cpu"},
        "corpus": {"paths": [str(tmp_path / "corpus.jsonl")]},
        "outputs": {"codec": "exact"},
    }
    dump_teacher(build(DumpConfig, config | {"sequences": {"max_length": 32}}), progress=False)
    cache = open_cache(tmp_path / "cache")
    for number, row in enumerate(rows):
        stored = cache.read([number], fields=(OUTPUTS_FIELD,))
        fed = tokenizer(*row.values(), return_tensors="pt", return_token_type_ids=True)
        assert stored.tokens_T.tolist() == fed["input_ids"][0].tolist()
        with torch.no_grad():
            expected = model(**fed).logits.numpy()
        np.testing.assert_allclose(stored.hidden[OUTPUTS_FIELD], expected, rtol=1e-4, atol=1e-5)
