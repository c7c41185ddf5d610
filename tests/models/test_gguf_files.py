"""Teachers in GGUF files: the header, which has the whole vocabulary, is parsed once."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.models import gguf_files
from kdcache.models.loading import load_model
from kdcache.progress import waiting
from kdcache.tasks import task_of

gguf = pytest.importorskip("gguf")

WORDS = ["\u2581the", "\u2581cat", "\u2581sat", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.gguf"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *WORDS]
    size = len(tokens)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": 16,
        "block_count": 1,
        "feed_forward_length": 32,
        "head_count": 2,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": 8,
        "vocab_size": size,
        "tokenizer_model": "llama",
        "token_list": tokens,
        "token_scores": [-float(n) for n in range(size)],
        "token_types": [2, 3, 3] + [6] * 256 + [1] * len(WORDS),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
    }.items():
        getattr(writer, f"add_{name}")(value)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (size, 16), "output": (size, 16), "output_norm": (16,)}
    shapes |= {f"blk.0.attn_{name}": (16, 16) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16), "blk.0.ffn_down": (16, 32)}
    shapes |= {"blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32) / 3)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def test_a_dump_parses_the_file_once(teacher, tmp_path, monkeypatch):
    parsed, own = [], gguf.GGUFReader.__init__

    def counted(self, *arguments, **more):
        parsed.append(arguments)
        own(self, *arguments, **more)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    reader = gguf.GGUFReader
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "the cat sat"}) + "\n")
    settings = {
        "output": str(tmp_path / "cache"),
        "teacher": {"model": str(teacher), "device": "cpu"},
        "corpus": {"paths": [str(tmp_path / "corpus.jsonl")]},
        "sequences": {"max_length": 32},
        "targets": {"top_k": 4, "codec": {"name": "exact"}},
    }
    dump_teacher(build(DumpConfig, settings), progress=False)
    assert len(parsed) == 1
    assert gguf.GGUFReader is reader
    assert not gguf_files._LAST  # and nothing of it stays in memory
    stored = open_cache(tmp_path / "cache").read([0])
    model = load_model(str(teacher), task_of("causal-lm"), dtype=None)
    with torch.no_grad():
        logits = model(torch.from_numpy(stored.tokens_T[None, :-1].astype(np.int64))).logits[0].double()
    expected = logits.log_softmax(1).topk(4).values
    np.testing.assert_allclose(stored.targets.logprobs_PK, expected, rtol=0, atol=3e-5)


def test_a_file_that_changed_is_parsed_anew(teacher):
    with gguf_files.parsed_once(str(teacher)):
        first = gguf.GGUFReader(str(teacher))
        assert gguf.GGUFReader(str(teacher)) is first
        teacher.write_bytes(teacher.read_bytes() + bytes(32))
        assert gguf.GGUFReader(str(teacher)) is not first
    gguf_files.forget()


def test_work_without_a_known_end_shows_its_time(capsys):
    with waiting("load teacher", after_s=0.01):
        time.sleep(0.2)
    assert "load teacher: 00:00" in capsys.readouterr().err
    for enabled, after_s in ((False, 0.01), (True, 10.0)):
        with waiting("load teacher", enabled=enabled, after_s=after_s):
            time.sleep(0.05)
        assert not capsys.readouterr().err
