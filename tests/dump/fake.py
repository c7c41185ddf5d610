"""A teacher that needs no model: a table of bigrams, so its answers are known and depend on no batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache import CacheWriter
from kdcache.config import build
from kdcache.corpus import load_corpus, plan_sequences
from kdcache.dump import DumpConfig, DumpResult, dump
from kdcache.dump.plan import make_plan
from kdcache.models.lm_head import LMHead, head_to_bytes
from kdcache.schema import SCALARS
from kdcache.storage.folder import Folder
from kdcache.teachers import Capabilities, LogitsTeacher, TeacherOutput
from tests import causal as causal_lm
from tests.synthetic import teacher_record, tokenizer_record

VOCAB_SIZE = 257
WIDTH = 8


class ByteEncoder:
    """One token per byte."""

    bos_id = None
    eos_id = 256

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


class BigramTeacher(LogitsTeacher):
    """Logits and states are looked up by the token; everything that can go wrong can be asked for.

    ``max_tokens`` is the largest padded batch that fits, ``delay_s`` the time of a batch, ``bad_token`` a token after
    which the answer is NaN.
    """

    def __init__(self, *, max_tokens: int | None = None, delay_s: float = 0.0, bad_token: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits_VV = 3 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
        self.states_VD = torch.randn(VOCAB_SIZE, WIDTH, generator=generator)
        self.record = teacher_record(VOCAB_SIZE, hidden_size=WIDTH, num_layers=1)
        self.cache_files: dict[str, bytes] = {}
        self.max_tokens, self.delay_s = max_tokens, delay_s
        if bad_token is not None:
            self.logits_VV[bad_token] = torch.nan
        self.batches: list[list[int]] = []
        self.num_refused = 0

    def run(self, sequences: Any, layers: Any = ()) -> TeacherOutput:
        padded = len(sequences) * max(s.num_positions for s in sequences)
        if self.max_tokens is not None and padded > self.max_tokens:
            self.num_refused += 1
            raise torch.OutOfMemoryError(f"{padded} tokens do not fit")
        time.sleep(self.delay_s)
        self.batches.append([s.index for s in sequences])
        inputs = torch.from_numpy(np.concatenate([s.tokens_T[:-1] for s in sequences]).astype(np.int64))
        labels = torch.from_numpy(causal_lm.labels([s.tokens_T for s in sequences]))
        hidden = {layer: self.states_VD[inputs] + layer for layer in layers}
        return TeacherOutput(lambda start, stop: self.logits_VV[inputs[start:stop]], labels, hidden)


class LinearTeacher(BigramTeacher):
    """Logits are the last hidden state (that of layer 1) times ``head_VD``, as a real model's are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.head_VD = 2 * torch.randn(VOCAB_SIZE, WIDTH, generator=torch.Generator().manual_seed(1))
        self.logits_VV = (self.states_VD + 1) @ self.head_VD.T
        self.cache_files = {"lm_head.safetensors": head_to_bytes(LMHead(self.head_VD))}

    capabilities = Capabilities(logits=True, scalars=SCALARS, hidden_states=True, lm_head=True, packing=True)


def run_dump(
    corpus: Path, output: Path | str, teacher: BigramTeacher, *, layers: tuple[int, ...] = (), **settings: Any
) -> DumpResult:
    """Dump ``corpus`` with the fake teacher: `dump` driven by ready-made parts."""
    values = {
        "output": str(output),
        "teacher": {"model": "fake"},
        "corpus": {"paths": [str(corpus)]},
        "sequences": {"max_length": 16},
        "targets": {"top_k": 5, "codec": "exact"},
        "hidden_states": {"codec": "exact"},
        "shard_positions": 100,
        "batch_tokens": 64,
    }
    config = build(DumpConfig, {**values, **settings})
    documents = load_corpus(config.corpus)
    sequences = plan_sequences(documents, ByteEncoder(), config.sequences)
    tokenizer = tokenizer_record(VOCAB_SIZE)
    plan, table, starts = make_plan(config, documents, sequences, teacher.record, tokenizer, list(layers))
    with CacheWriter(Folder(str(output))) as writer:
        return dump(
            sequences,
            teacher,
            plan,
            writer,
            table=table,
            starts=starts,
            tokenizer_files={"tokenizer.json": b"{}"},
            cache_files=teacher.cache_files,
            batch_tokens=config.batch_tokens or 64,
        )
