"""A cache of realistic size and entropy without a teacher: Zipf-like ids, log-probabilities that fall with the rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from kdcache.cache import CacheWriter, ShardData, layout
from kdcache.codecs import targets_codec
from kdcache.fields import TokenRows, targets_field, tokens_field
from kdcache.schema import Plan, Targets, TargetsRecord, token_hash
from kdcache.storage.folder import Folder
from tests.synthetic import corpus_record, teacher_record, tokenizer_record


def make_targets(generator: np.random.Generator, num_positions: int, top_k: int, vocab_size: int) -> Targets:
    """Return targets whose ids repeat as words do and whose gaps are exponential, as a real teacher's are."""
    # Distinct ids per row: a random walk through the frequency ranks, then one fixed scrambling into ids.
    steps = generator.geometric(0.02, (num_positions, top_k)).cumsum(axis=1) % vocab_size
    ids = np.random.default_rng(0).permutation(vocab_size).astype(np.int32)[steps]
    gaps = generator.exponential(2.0 / np.arange(1, top_k + 1), (num_positions, top_k)).astype(np.float32)
    gaps[:, 0] = 0
    head = -gaps.cumsum(axis=1)
    log_tail = np.log(generator.uniform(0.02, 0.2, num_positions)).astype(np.float32)
    head += (np.log1p(-np.exp(log_tail)) - np.log(np.exp(head).sum(axis=1)))[:, None]
    gold = np.minimum(head[:, 0], -generator.exponential(3.0, num_positions)).astype(np.float32)
    return Targets(ids, head, log_tail, gold, generator.exponential(3.0, num_positions).astype(np.float32))


def write_cache(
    path: Path,
    *,
    num_positions: int,
    length: int,
    top_k: int,
    vocab_size: int,
    codec: str = "compact",
    shard_positions: int = 65_536,
) -> Path:
    """Write a cache of sequences of ``length`` positions at ``path`` through the real writer."""
    num_sequences = num_positions // length
    per_shard = max(1, shard_positions // length)
    num_shards = -(-num_sequences // per_shard)
    record = TargetsRecord(top_k=top_k)
    coder = targets_codec({"name": codec}, record, vocab_size)
    table = pa.table({"sequence": np.arange(num_sequences), "shard": np.arange(num_sequences) // per_shard})
    plan = Plan(
        task="causal-lm",
        teacher=teacher_record(vocab_size),
        tokenizer=tokenizer_record(vocab_size),
        corpus=corpus_record(num_sequences),
        targets=record,
        sequences={"max_length": length},
        fields=(tokens_field(coder.vocab_size), targets_field(coder)),
        num_sequences=num_sequences,
        num_positions=num_sequences * length,
        num_tokens=num_sequences * (length + 1),
        num_shards=num_shards,
        shard_positions=1,
        table_sha256=layout.sha256(layout.table_to_parquet(table)),
        provenance={},
    )
    with CacheWriter(Folder(str(path))) as writer:
        for shard in writer.begin(plan, table, {}):
            first = shard * per_shard
            writer.write_shard(_shard(shard, first, min(per_shard, num_sequences - first), length, top_k, vocab_size))
        writer.finalise()
    return path


def _shard(shard: int, first: int, count: int, length: int, top_k: int, vocab_size: int) -> ShardData:
    generator = np.random.default_rng(shard)
    tokens = (generator.zipf(1.2, count * (length + 1)) % vocab_size).astype(np.uint32)
    pieces = tokens.reshape(count, length + 1)
    return ShardData(
        index=shard,
        tokens=TokenRows(
            tokens_T=tokens,
            loss_mask_P=np.ones(count * length, np.uint8),
            num_tokens_N=np.full(count, length + 1),
            num_positions_N=np.full(count, length),
            labels_P=pieces[:, 1:].reshape(-1),
        ),
        values={"targets": make_targets(generator, count * length, top_k, vocab_size)},
        table=pa.table(
            {
                "sequence": np.arange(first, first + count),
                "num_positions": np.full(count, length, np.int32),
                "token_hash": [token_hash(piece) for piece in pieces],
            }
        ),
    )
