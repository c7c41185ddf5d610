"""Targets and caches made of random numbers: no model, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from kdcache.cache import CacheWriter, ShardData
from kdcache.cache.layout import sha256, table_to_parquet
from kdcache.cache.tail_prior import TailSum
from kdcache.codecs import targets_codec, vector_codec
from kdcache.fields import SEGMENT_IDS, TokenRows, targets_field, tokens_field, vectors_field
from kdcache.schema import (
    CorpusRecord,
    FieldRecord,
    Plan,
    Samples,
    Targets,
    TargetsRecord,
    TeacherRecord,
    TokenizerRecord,
    WeightsIdentity,
    token_hash,
)
from kdcache.storage.folder import Folder
from tests import causal as causal_lm

WIDTH = 6


def targets_of(logits_PV: np.ndarray, labels_P: np.ndarray, record: TargetsRecord | int, *, seed: int = 0) -> Targets:
    """Reduce logits to targets (of top-k, where a number is given) in float64, plainly."""
    record = TargetsRecord(top_k=record) if isinstance(record, int) else record
    top_k = record.top_k
    logits_PV = logits_PV.astype(np.float64)
    shifted = logits_PV - logits_PV.max(axis=1, keepdims=True)
    logprobs_PV = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs_PV, axis=1, kind="stable")
    ordered = np.take_along_axis(logprobs_PV, ids, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where no ids are kept, the mass outside them is 1 without rounding.
        log_tail = np.log(np.exp(ordered[:, top_k:]).sum(axis=1)) if top_k else np.zeros(len(ids))
        entropy = -np.where(np.isfinite(logprobs_PV), np.exp(logprobs_PV) * logprobs_PV, 0.0).sum(axis=1)
    targets = Targets(
        ids_PK=ids[:, :top_k].astype(np.int32),
        logprobs_PK=ordered[:, :top_k].astype(np.float32),
        log_tail_P=log_tail.astype(np.float32),
        gold_logprob_P=logprobs_PV[np.arange(len(labels_P)), labels_P].astype(np.float32),
        entropy_P=entropy.astype(np.float32),
    )
    if record.is_ragged:
        _cut(targets, ordered, record)
    if record.temperatures:
        kept = np.full(len(ids), top_k) if targets.num_kept_P is None else targets.num_kept_P
        targets.log_tails_PG = _tails(ordered, kept, record.temperatures)
    if record.num_samples:
        targets.samples = _draw(ids, ordered, record, np.random.default_rng(seed))
    if record.probabilities == "kept":
        kept_PK = ordered[:, :top_k] - np.log(np.exp(ordered[:, :top_k]).sum(axis=1, keepdims=True))
        targets.logprobs_PK, targets.log_tail_P = kept_PK.astype(np.float32), np.full(len(ids), -np.inf, np.float32)
    for name in {"gold_logprob", "entropy"} - set(record.scalars):
        setattr(targets, f"{name}_P", None)
    return targets


def _cut(targets: Targets, ordered: np.ndarray, record: TargetsRecord) -> None:
    probs = np.exp(ordered[:, : record.top_k])
    enough = (np.cumsum(probs, axis=1) < record.min_mass).sum(axis=1) + 1
    targets.num_kept_P = np.minimum((probs >= record.min_prob).sum(axis=1), enough).clip(1, record.top_k)
    kept = np.arange(record.top_k) < targets.num_kept_P[:, None]
    rest = np.arange(ordered.shape[1]) >= targets.num_kept_P[:, None]
    targets.ids_PK = np.where(kept, targets.ids_PK, targets.ids_PK[:, :1])
    targets.logprobs_PK = np.where(kept, targets.logprobs_PK, np.float32(-np.inf))
    with np.errstate(divide="ignore"):
        targets.log_tail_P = np.log(np.where(rest, np.exp(ordered), 0).sum(axis=1)).astype(np.float32)


def _tails(ordered: np.ndarray, num_kept: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
    rest = np.arange(ordered.shape[1]) >= num_kept[:, None]
    tempered = [np.exp(ordered / t) for t in temperatures]
    with np.errstate(divide="ignore"):
        logs = [np.log(np.where(rest, p, 0).sum(axis=1) / p.sum(axis=1)) for p in tempered]
    return np.stack(logs, axis=1).astype(np.float32)


def _draw(ids: np.ndarray, ordered: np.ndarray, record: TargetsRecord, generator: np.random.Generator) -> Samples:
    tail = np.exp(ordered)
    tail[:, : record.top_k] = 0
    counts = np.zeros(tail.shape, dtype=int)
    for row, p in enumerate(tail):
        if p.sum() > 0:
            counts[row] = generator.multinomial(record.num_samples, p / p.sum())
    order = np.argsort(-counts, axis=1, kind="stable")[:, : max(int((counts > 0).sum(axis=1).max(initial=0)), 1)]
    counts = np.take_along_axis(counts, order, axis=1)
    return Samples(np.where(counts > 0, np.take_along_axis(ids, order, axis=1), 0), counts)


def random_targets(
    num_positions: int, record: TargetsRecord | int, vocab_size: int, *, seed: int = 0, scale: float = 3.0
) -> Targets:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, scale, (num_positions, vocab_size))
    return targets_of(logits, generator.integers(0, vocab_size, num_positions), record)


class SyntheticCache:
    """What was written, kept in plain lists, so that a test can say what it must read back."""

    def __init__(
        self,
        num_sequences: int = 13,
        *,
        top_k: int = 4,
        vocab_size: int = 50,
        codec: str = "exact",
        record: TargetsRecord | None = None,
        hidden_codec: str = "exact",
        shard_sequences: int = 4,
        packed: bool = False,
        hidden: tuple[str, ...] = (),
        token_vectors: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        generator = np.random.default_rng(seed)
        self.record = record or TargetsRecord(top_k=top_k)
        if self.record.kind == "hidden":
            hidden = (*hidden, "hidden-2")
        self.vocab_size, self.codec, self.hidden_names = vocab_size, {"name": codec}, hidden
        self.top_k, self.hidden_codec = self.record.top_k, {"name": hidden_codec}
        self.lengths = generator.integers(1, 9, num_sequences)
        self.tokens = [generator.integers(0, vocab_size, n + 1).astype(np.uint32) for n in self.lengths]
        self.masks = [(generator.random(n) < 0.8).astype(np.uint8) for n in self.lengths]
        self.segments = [np.sort(generator.integers(0, 3, n + 1)).astype(np.uint16) for n in self.lengths]
        self.packed = packed
        self.targets = [
            targets_of(generator.normal(0, 3, (len(t) - 1, vocab_size)), t[1:].astype(int), self.record, seed=n)
            for n, t in enumerate(self.tokens)
        ]
        self.tail_sums = [
            TailSum(generator.random(vocab_size) * n / vocab_size, int(n)) if self.record.tail_prior else None
            for n in self.lengths
        ]
        self.states = [{h: generator.normal(size=(n, WIDTH)).astype(np.float32) for h in hidden} for n in self.lengths]
        # What every token has, as the field "attention", of this shape.
        self.token_vectors = None
        if token_vectors is not None:
            numbers = np.random.default_rng(seed + 1)
            self.token_vectors = [numbers.normal(size=(n + 1, *token_vectors)).astype(np.float32) for n in self.lengths]
        self.starts = [*range(0, num_sequences, shard_sequences), num_sequences]

    def fields(self) -> tuple[FieldRecord, ...]:
        codec = targets_codec(self.codec, self.record, self.vocab_size)
        states = vector_codec(self.hidden_codec)
        return (
            tokens_field(codec.vocab_size, (SEGMENT_IDS,) if self.packed else ()),
            targets_field(codec),
            *(vectors_field(name, states, WIDTH) for name in self.hidden_names),
            *self._token_fields(),
        )

    def _token_fields(self) -> list[FieldRecord]:
        if self.token_vectors is None:
            return []
        shape = self.token_vectors[0].shape[1:]
        return [vectors_field("attention", vector_codec({"name": "exact"}), shape, axis="tokens")]

    def table(self) -> pa.Table:
        return pa.table(
            {
                "sequence": np.arange(len(self.tokens)),
                "document_id": [f"document {n}" for n in range(len(self.tokens))],
                "num_positions": self.lengths.astype(np.int32),
                "token_hash": [token_hash(tokens) for tokens in self.tokens],
            }
        )

    def plan(self, **changes: Any) -> Plan:
        values: dict[str, Any] = {
            "task": "causal-lm",
            "teacher": teacher_record(self.vocab_size),
            "tokenizer": tokenizer_record(self.vocab_size),
            "corpus": corpus_record(len(self.tokens)),
            "targets": self.record,
            "sequences": {"max_length": 16, "packing": "none"},
            "fields": self.fields(),
            "num_sequences": len(self.tokens),
            "num_positions": int(self.lengths.sum()),
            "num_tokens": int((self.lengths + 1).sum()),
            "num_shards": len(self.starts) - 1,
            "shard_positions": 1,
            "table_sha256": sha256(table_to_parquet(self.table())),
            "provenance": {"created": "2024-01-01", "versions": {"kdcache": "0.1.0"}},
        }
        return Plan(**{**values, **changes})

    def shard(self, index: int) -> ShardData:
        members = range(self.starts[index], self.starts[index + 1])
        states = vector_codec(self.hidden_codec)
        return ShardData(
            index=index,
            tokens=TokenRows(
                tokens_T=np.concatenate([self.tokens[n] for n in members]),
                num_tokens_N=self.lengths[members.start : members.stop] + 1,
                num_positions_N=self.lengths[members.start : members.stop],
                loss_mask_P=np.concatenate([self.masks[n] for n in members]),
                labels_P=causal_lm.labels([self.tokens[n] for n in members]),
                segment_ids_T=np.concatenate([self.segments[n] for n in members]) if self.packed else None,
            ),
            values={
                "targets": Targets.concatenate([self.targets[n] for n in members]),
                **{
                    name: states.stage(np.concatenate([self.states[n][name] for n in members]))
                    for name in self.hidden_names
                },
                **self._token_values(members),
            },
            table=self.table().slice(members.start, len(members)),
            tail_sum=self._tail_sum(members),
        )

    def _token_values(self, members: range) -> dict[str, np.ndarray]:
        if self.token_vectors is None:
            return {}
        return {"attention": np.concatenate([self.token_vectors[n] for n in members])}

    def _tail_sum(self, members: range) -> TailSum | None:
        found = [self.tail_sums[n] for n in members]
        if found[0] is None:
            return None
        return TailSum(sum(item.sum_V for item in found), sum(item.num_positions for item in found))

    def cache_files(self) -> dict[str, bytes]:
        """The files that the cache has once: an LM head where the last hidden state stands for the distribution."""
        if self.record.kind != "hidden":
            return {}
        generator = np.random.default_rng(5)
        tensors = {
            "weight": generator.normal(size=(self.vocab_size, WIDTH)).astype(np.float32),
            "bias": generator.normal(size=self.vocab_size).astype(np.float32),
        }
        return {"lm_head.safetensors": save(tensors, metadata={"lm_head": '{"scale": 0.5, "softcap": 30.0}'})}

    def write(self, path: Path | str, *, shards: range | None = None, finish: bool = True) -> str:
        """Write ``shards`` that are missing (default: all) with the real writer."""
        with CacheWriter(Folder(str(path))) as writer:
            files = {"tokenizer.json": b'{"version": "1.0"}'}
            missing = writer.begin(self.plan(), self.table(), files, self.cache_files())
            for index in missing:
                if shards is None or index in shards:
                    writer.write_shard(self.shard(index))
            if finish:
                writer.finalise()
        return str(path)


def teacher_record(vocab_size: int, **changes: Any) -> TeacherRecord:
    values = {
        "name": "random-numbers",
        "architecture": "None",
        "identity": WeightsIdentity(sha256="0" * 64, dtype="float32", num_parameters=1),
        "num_layers": 2,
        "hidden_size": WIDTH,
        "vocab_size": vocab_size,
    }
    return TeacherRecord(**{**values, **changes})


def tokenizer_record(vocab_size: int) -> TokenizerRecord:
    return TokenizerRecord(sha256="1" * 64, vocab_size=vocab_size, bos_id=None, eos_id=None, pad_id=None)


def corpus_record(num_documents: int) -> CorpusRecord:
    return CorpusRecord(
        sources=("made up",),
        text_field="text",
        fingerprint="2" * 64,
        num_documents=num_documents,
        num_empty=0,
        num_too_short=0,
        metadata_columns=(),
    )
