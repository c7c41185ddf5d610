"""Caches of every kind, made once for all cases, and the models and corpora that they are made from."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import decoders

from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from tests.conftest import TEXTS, dump_settings
from tests.task_models import TINY_TASKS, dump_config
from tests.tiny import bpe_tokenizer, llama

#: What differs from the fixture ``dumped`` of the tests, by the name of a cache.
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "compact": {
        "targets": {"top_k": 6, "codec": "compact", "tail_prior": True},
        "hidden_states": {"layers": [1], "codec": "int8"},
    },
    "hidden": {"targets": {"kind": "hidden"}, "hidden_states": {"layers": ["last"], "codec": "exact"}},
    "hybrid": {
        "targets": {"kind": "hybrid", "top_k": 4, "num_samples": 16, "codec": "compact"},
        "hidden_states": {"layers": []},
    },
    "ragged": {"targets": {"top_k": 20, "min_prob": 0.01, "codec": "compact"}, "hidden_states": {"layers": []}},
    "packed": {"sequences": {"max_length": 32, "packing": "window"}, "hidden_states": {"layers": []}},
}


class Library:
    """Everything in one directory; each thing is made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    @cached_property
    def corpus(self) -> Path:
        """Ten documents with a column of metadata."""
        path = self.root / "texts.jsonl"
        rows = [{"text": text, "source": f"page {number}"} for number, text in enumerate(TEXTS)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    @cached_property
    def teacher(self) -> Path:
        """A tiny Llama, saved with its tokenizer."""
        path = self.root / "teacher"
        tokenizer = bpe_tokenizer()
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save_pretrained(path)
        llama(len(tokenizer) + 22, seed=1).save_pretrained(path)
        return path

    def dump_config(self, kind: str, output: Path) -> DumpConfig:
        """The configuration of the cache ``kind`` of `KINDS`, for ``output``."""
        return build(DumpConfig, {**dump_settings(output, self.teacher, self.corpus), **KINDS[kind]})

    def cache(self, name: str) -> Path:
        """The cache ``name`` of `names`."""
        path = self.root / "caches" / name
        if not path.exists():
            if name in KINDS:
                config = self.dump_config(name, path)
            else:
                config = dump_config(name, TINY_TASKS[name].write(self.root / name), path)
            dump_teacher(config, progress=False)
        return path

    @property
    def names(self) -> list[str]:
        """Every cache: of causal-lm by the kind of its targets, of the other tasks by the task."""
        return [*KINDS, *TINY_TASKS]
