"""What every test shares: one thread, no network, and one tiny teacher with a cache that was dumped from it."""

from __future__ import annotations

import os

# Before torch and the Hugging Face libraries are imported: the tests must not depend on the machine or on a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Dozens of processes are started, and none of them should have to compile the sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

#: Servers and buckets of tests on an object store; synthetic caches; processes whose imports are done.
pytest_plugins = ["tests.object_store", "tests.caches", "tests.preloaded"]

settings.register_profile("kdcache", deadline=None, print_blob=True)
settings.load_profile("kdcache")

#: Documents of many lengths: empty, one token, shorter and longer than a sequence.
TEXTS = [
    "the cat sat on the mat",
    "",
    "water boils at one hundred degrees and freezes at zero; " * 4,
    "a",
    "a student learns from a teacher who has read everything",
    "she said that the train would leave at seven, not at eight. " * 2,
    "naïve café, 東京 and ½ of a 🙂",
    "to be or not to be",
    "the dog looked at the cat and the cat looked at the dog " * 3,
    "x y z",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store what a test reads from remote caches neither among the user's files nor where other tests find it."""
    monkeypatch.setenv("KDCACHE_STORE", str(tmp_path_factory.getbasetemp() / "stores" / uuid.uuid4().hex))


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Tests outlive no power cut (those that kill processes run them elsewhere), and fsync is slow on a busy disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def cheap_collections() -> None:
    """Leave what was imported out of garbage collections, of which every training run makes one (0.4 s each)."""
    gc.freeze()


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten documents with a column of metadata."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rows = [{"text": text, "source": f"page {number}"} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, saved; its head has more rows than the tokenizer has ids."""
    from tokenizers import decoders

    from tests.tiny import bpe_tokenizer, llama

    path = tmp_path_factory.mktemp("teacher")
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save_pretrained(path)
    llama(len(tokenizer) + 22, seed=1).save_pretrained(path)
    return path


def dump_settings(output: str | Path, teacher_dir: Path, corpus_file: Path) -> dict[str, Any]:
    """The settings of the fixture ``dumped``, for a cache in ``output``."""
    return {
        "output": str(output),
        "teacher": {"model": str(teacher_dir), "device": "cpu"},
        "corpus": {"paths": [str(corpus_file)]},
        "sequences": {"max_length": 16},
        "targets": {"top_k": 6, "codec": "exact"},
        "hidden_states": {"layers": ["last", 1], "codec": "exact"},
        "shard_positions": 60,
        "batch_tokens": 64,
    }


@pytest.fixture(scope="session")
def dumped(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, corpus_file: Path) -> Path:
    """A cache that `dump_teacher` made of both: several shards, exact values, two layers of hidden states."""
    from kdcache.config import build
    from kdcache.dump import DumpConfig, dump_teacher

    path = tmp_path_factory.mktemp("dumped") / "cache"
    dump_teacher(build(DumpConfig, dump_settings(path, teacher_dir, corpus_file)), progress=False)
    return path


@pytest.fixture(scope="session")
def task_caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exact cache of every task but causal-lm, by the task's name; models and corpus lie beside it."""
    from kdcache.dump import dump_teacher
    from tests.task_models import TINY_TASKS, dump_config

    found = {}
    for task, tiny in TINY_TASKS.items():
        path = tmp_path_factory.mktemp(f"task-{task}")
        dump_teacher(dump_config(task, tiny.write(path), path / "cache"), progress=False)
        found[task] = path / "cache"
    return found
