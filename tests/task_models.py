"""A tiny teacher, a tiny corpus and a tiny student for every task, made in process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdcache.config import build
from kdcache.dump import DumpConfig
from kdcache.tasks import task_of

WORDS = "the cat dog sat ran on mat and a red blue big old tree house sun moon saw liked found hid under near with"
SENTENCES = [
    "the cat sat on the mat and saw the red moon",
    "a big dog ran near the old house",
    "the sun hid under the blue tree",
    "a cat liked the dog and the dog liked a cat",
    "the old tree found a house with the moon",
    "red sun and blue moon",
    "the dog",
    "a mat under a cat on a house near a tree with the sun and the moon and the big red dog",
]


def bert_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Whole words and letters, with BERT's special tokens around them."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocab)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        **special,
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram pieces that end with EOS, as T5's."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -2.0 - n / 10) for n, word in enumerate(WORDS.split())]
    backend = Tokenizer(models.Unigram(pieces + [(letter, -9.0) for letter in "\u2581abcdefghijklmnoprstuvwxyz"], 2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", cls_token=None
    )


def bert(model_class: str, *, width: int = 16, num_layers: int = 2, seed: int = 0, **settings: Any) -> Any:
    """A BERT of random weights, large enough that its answers differ."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(bert_tokenizer()),
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return getattr(transformers, model_class)(transformers.BertConfig(**sizes | settings))


def t5(*, width: int = 16, num_layers: int = 2, seed: int = 0, tie: bool = False) -> Any:
    """A T5 of random weights, with a head of its own unless it is tied."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=num_layers,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=tie,
    )
    return transformers.T5ForConditionalGeneration(config)


@dataclass(frozen=True)
class TinyTask:
    """What a test needs to run a task: the teacher's model, a student's, a tokenizer, rows of a corpus, settings."""

    teacher: Callable[[], Any]
    student: Callable[[], Any]
    tokenizer: Callable[[], Any]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]

    def write(self, path: Path) -> dict[str, str]:
        """Write both models and the corpus under ``path``; return where they are."""
        for name, make in (("teacher", self.teacher), ("student", self.student)):
            make().save_pretrained(path / name)
            self.tokenizer().save_pretrained(path / name)
        (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return {name: str(path / name) for name in ("teacher", "student")} | {"corpus": str(path / "corpus.jsonl")}


def _bert_pair(model_class: str, **settings: Any) -> dict[str, Callable[[], Any]]:
    return {
        "teacher": lambda: bert(model_class, seed=1, **settings),
        "student": lambda: bert(model_class, width=8, num_layers=1, seed=2, **settings),
        "tokenizer": bert_tokenizer,
    }


_CLASSES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
_TEXTS = [{"text": text} for text in SENTENCES]

TINY_TASKS: dict[str, TinyTask] = {
    "masked-lm": TinyTask(
        **_bert_pair("BertForMaskedLM"), rows=_TEXTS, settings={"max_length": 16, "mask_prob": 0.3, "replicas": 2}
    ),
    "sequence-classification": TinyTask(
        **_bert_pair("BertForSequenceClassification", num_labels=3, **_CLASSES),
        rows=[
            {"text": text, "text_pair": SENTENCES[n - 1], "label": ["bad", "fair", "good", None][n % 4]}
            for n, text in enumerate(SENTENCES)
        ],
        settings={"max_length": 24},
    ),
    "sequence-regression": TinyTask(
        **_bert_pair("BertForSequenceClassification", num_labels=1),
        rows=[
            {"text": text, "text_pair": SENTENCES[n - 1], "label": None if n == 3 else 0.5 * n}
            for n, text in enumerate(SENTENCES)
        ],
        settings={"max_length": 24},
    ),
    "seq2seq-lm": TinyTask(
        teacher=lambda: t5(seed=1),
        student=lambda: t5(width=8, num_layers=1, seed=2),
        tokenizer=t5_tokenizer,
        rows=[{"input": text, "target": SENTENCES[n - 1]} for n, text in enumerate(SENTENCES)],
        settings={"max_length": 32, "max_target_length": 16},
    ),
    "embedding": TinyTask(
        teacher=lambda: bert("BertModel", seed=1),
        student=lambda: bert("BertModel", num_layers=1, seed=2),
        tokenizer=bert_tokenizer,
        rows=[
            {"text": text, "text_pair": SENTENCES[n - 1] if n % 2 else None, "label": float(n)}
            for n, text in enumerate(SENTENCES)
        ],
        settings={"max_length": 16},
    ),
    "ranking": TinyTask(
        **_bert_pair("BertForSequenceClassification", num_labels=1),
        rows=[
            {
                "query": " ".join(text.split()[:3]),
                "documents": [SENTENCES[(n + k) % len(SENTENCES)] for k in range(2 + n % 3)],
                "relevance": [int(k == n % 2) for k in range(2 + n % 3)],
            }
            for n, text in enumerate(SENTENCES)
        ],
        settings={"max_length": 24},
    ),
}
"""Every task but causal-lm, which most other tests are about."""


def dump_config(task: str, found: dict[str, str], output: Path, **more: Any) -> DumpConfig:
    """A dump that keeps everything exactly."""
    gives_tokens = task_of(task).gives == "tokens"
    targets = {"targets": {"top_k": 25, "codec": "exact", "tail_prior": False}} if gives_tokens else {}
    return build(
        DumpConfig,
        {
            "output": str(output),
            "task": task,
            "teacher": {"model": found["teacher"], "device": "cpu"},
            "corpus": {"paths": [found["corpus"]]},
            "sequences": TINY_TASKS[task].settings,
            "shard_positions": 5,
            "batch_tokens": 64,
            **targets,
            **more,
        },
    )
