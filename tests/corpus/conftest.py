from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.corpus import Corpus, CorpusConfig, load_corpus


class ByteEncoder:
    """One token per byte; id 1000 is BOS, 1001 is EOS."""

    def __init__(self, bos: bool = False, eos: bool = True) -> None:
        self.bos_id = 1000 if bos else None
        self.eos_id = 1001 if eos else None

    def encode(self, texts: list[str]) -> list[list[int]]:
        prefix = [] if self.bos_id is None else [self.bos_id]
        return [prefix + list(text.encode()) for text in texts]


@pytest.fixture(autouse=True)
def hf_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def load() -> Callable[..., Corpus]:
    def load_paths(*paths: Path | str, **settings: Any) -> Corpus:
        return load_corpus(CorpusConfig(paths=tuple(str(path) for path in paths), **settings))

    return load_paths


def write_json(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus]


def ids(corpus: Corpus) -> list[str]:
    return [document.id for document in corpus]
