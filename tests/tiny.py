"""Tokenizers, models and caches small enough to build in every test."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdcache.cache import CacheWriter, ShardData
from kdcache.codecs import targets_codec
from kdcache.fields import TokenRows, targets_field, tokens_field
from kdcache.models.tokenizer import tokenizer_record
from kdcache.schema import CorpusRecord, Plan, Targets, TargetsRecord, TeacherRecord, WeightsIdentity
from kdcache.storage.folder import Folder
from tests.causal import pad_batch

SENTENCES = [
    "the cat sat on the mat and looked at the dog",
    "a student learns from a teacher who has read everything",
    "water boils at one hundred degrees and freezes at zero",
    "she said that the train would leave at seven, not at eight",
]


def bpe_tokenizer(*, vocab_size: int = 290, lowercase: bool = False, **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocab = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama(vocab_size: int, *, seed: int = 0, width: int = 16, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        # The default of 0.02 gives almost flat distributions, which would hide mistakes in targets.
        initializer_range=0.3,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def teacher_targets(teacher: Any, batch: dict[str, Any], top_k: int, vocab_size: int) -> Targets:
    """What a dump computes, written plainly: the whole log-softmax, sorted."""
    inputs = {name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask") if name in batch}
    with torch.no_grad():
        logits = teacher(**inputs).logits.flatten(0, 1)[torch.from_numpy(batch["rows"]), :vocab_size]
    logprobs_PV = logits.double().log_softmax(-1)
    ordered, ids = logprobs_PV.sort(descending=True, stable=True)
    labels = torch.from_numpy(batch["labels"])
    return Targets(
        ids_PK=ids[:, :top_k].numpy(),
        logprobs_PK=ordered[:, :top_k].float().numpy(),
        log_tail_P=ordered[:, top_k:].logsumexp(-1).float().numpy(),
        gold_logprob_P=logprobs_PV.gather(1, labels[:, None])[:, 0].float().numpy(),
        entropy_P=-(logprobs_PV.exp() * logprobs_PV).sum(-1).float().numpy(),
    )


def random_sequences(num_sequences: int, vocab_size: int, *, seed: int = 0, max_length: int = 14) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, max_length + 1, num_sequences)
    return [generator.integers(0, vocab_size, length + 1).astype(np.uint32) for length in lengths]


def make_cache(
    path: Path,
    teacher: Any,
    tokenizer: Any,
    sequences: list[np.ndarray],
    *,
    top_k: int = 8,
    num_shards: int = 3,
    codec: str = "exact",
    max_length: int = 16,
    finish: bool = True,
) -> Path:
    """Write a cache with the real writer; every fifth position does not count."""
    record = tokenizer_record(tokenizer)
    starts = np.linspace(0, len(sequences), num_shards + 1).astype(int)
    targets = TargetsRecord(top_k=top_k)
    coder = targets_codec({"name": codec}, targets, record.vocab_size)
    lengths = np.array([len(sequence) - 1 for sequence in sequences])
    table = pa.table({"sequence": np.arange(len(sequences)), "num_positions": lengths})
    plan = Plan(
        task="causal-lm",
        teacher=TeacherRecord(
            name="tiny-teacher",
            architecture=type(teacher).__name__,
            identity=WeightsIdentity(sha256="0" * 64, dtype="float32", num_parameters=teacher.num_parameters()),
            num_layers=2,
            hidden_size=16,
            vocab_size=teacher.config.vocab_size,
        ),
        tokenizer=record,
        corpus=CorpusRecord(
            sources=("made up",),
            text_field="text",
            fingerprint=str(len(sequences)),
            num_documents=len(sequences),
            num_empty=0,
            num_too_short=0,
            metadata_columns=(),
        ),
        targets=targets,
        sequences={"max_length": max_length, "packing": "none"},
        fields=(tokens_field(coder.vocab_size), targets_field(coder)),
        num_sequences=len(sequences),
        num_positions=int(lengths.sum()),
        num_tokens=int((lengths + 1).sum()),
        num_shards=num_shards,
        shard_positions=1,
        table_sha256="0" * 64,
        provenance={},
    )
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = {item.name: item.read_bytes() for item in Path(directory).iterdir()}
    with CacheWriter(Folder(str(path))) as writer:
        for shard in writer.begin(plan, table, files):
            begin, end = starts[shard], starts[shard + 1]
            batch = pad_batch(sequences[begin:end], pad_id=0)
            mask = np.ones(len(batch["labels"]), dtype=np.uint8)
            mask[::5] = 0
            writer.write_shard(
                ShardData(
                    index=shard,
                    tokens=TokenRows(
                        tokens_T=np.concatenate(sequences[begin:end]),
                        num_tokens_N=lengths[begin:end] + 1,
                        num_positions_N=lengths[begin:end],
                        loss_mask_P=mask,
                        labels_P=batch["labels"],
                    ),
                    values={"targets": teacher_targets(teacher, batch, top_k, record.vocab_size)},
                    table=table.slice(begin, end - begin),
                )
            )
        if finish:
            writer.finalise()
    return path
