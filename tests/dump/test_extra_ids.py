"""Tokenizers with more ids than their model, as Gemma 3 has: only a text that uses one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import TeacherError
from kdcache.students import StudentConfig, load_student
from kdcache.teachers import TeacherConfig
from kdcache.verify.against_teacher import verify_against_teacher
from kdcache.write import WriteConfig, write_targets
from tests.task_models import SENTENCES, bert, bert_tokenizer, t5, t5_tokenizer
from tests.tiny import bpe_tokenizer, llama

EXTRA = "<image_soft_token>"


def write(path: Path, model, tokenizer, rows: list[dict[str, str]]) -> dict[str, object]:
    assert tokenizer.add_tokens([EXTRA]) == 1
    for part in (model, tokenizer):
        part.save_pretrained(path / "teacher")
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output": str(path / "cache"),
        "teacher": {"model": str(path / "teacher"), "device": "cpu"},
        "corpus": {"paths": [str(path / "corpus.jsonl")]},
    }


def test_an_id_that_no_text_uses(tmp_path, caplog):
    tokenizer = bpe_tokenizer()
    size = len(tokenizer)
    settings = write(tmp_path, llama(size), tokenizer, [{"text": text} for text in SENTENCES])
    dump_teacher(build(DumpConfig, settings | {"sequences": {"max_length": 32}}), progress=False)
    assert f"the tokenizer has {size + 1} ids and" in caplog.text
    assert f"the others, such as {EXTRA}, are in no text" in caplog.text
    cache = open_cache(tmp_path / "cache")
    assert cache.vocab_size == size
    teacher = TeacherConfig(model=str(tmp_path / "teacher"), device="cpu")
    check = verify_against_teacher(cache, 3, teacher=teacher, progress=False)
    assert check.ok
    student = load_student(StudentConfig(model=str(tmp_path / "teacher")), cache.manifest, cache.tokenizer_dir())
    assert student.vocab_size == size


def test_an_id_that_a_text_uses_is_refused_with_its_document(tmp_path):
    tokenizer = bpe_tokenizer()
    rows = [{"text": "the cat"}, {"text": f"the {EXTRA} sat"}]
    size = len(tokenizer)
    settings = write(tmp_path, llama(size), tokenizer, rows)
    with pytest.raises(TeacherError, match=rf"document corpus.jsonl.*:.*has the token {EXTRA} \(id {size}\)"):
        dump_teacher(build(DumpConfig, settings), progress=False)
    assert not (tmp_path / "cache").exists()


def test_random_tokens_of_masked_texts_are_ids_that_the_model_has(tmp_path):
    tokenizer = bert_tokenizer()
    size = len(tokenizer)
    settings = write(tmp_path, bert("BertForMaskedLM"), tokenizer, [{"text": text} for text in SENTENCES])
    masking = {"random_share": 0.5, "kept_share": 0.0, "mask_prob": 0.9, "replicas": 20, "max_length": 32}
    dump_teacher(
        build(DumpConfig, settings | {"task": "masked-lm", "sequences": masking, "targets": {"top_k": 4}}),
        progress=False,
    )
    cache = open_cache(tmp_path / "cache")
    tokens = cache.read(range(len(cache))).tokens_T
    assert np.unique(tokens).max() == size - 1


def test_written_targets_of_a_text_that_uses_it(tmp_path):
    tokenizer = t5_tokenizer()
    model = t5()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(64 - len(tokenizer))])
    settings = write(tmp_path, model, tokenizer, [{"input": "the cat"}, {"input": f"the {EXTRA}"}])
    settings["output"] = str(tmp_path / "out.jsonl")
    with pytest.raises(TeacherError, match=r"document 1 has a token with the id 64, but .* only has 64 ids"):
        write_targets(build(WriteConfig, settings), progress=False)
