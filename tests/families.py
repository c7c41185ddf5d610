"""Tiny causal language models of several families, with random weights large enough to show mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.tiny import llama

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _make(name: str, **settings: Any) -> Any:
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def gpt2(vocab_size: int) -> Any:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def gemma2(vocab_size: int) -> Any:
    return _make(
        "Gemma2",
        vocab_size=vocab_size,
        head_dim=8,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
        sliding_window=6,
        **_SIZES,
    )


def granite(vocab_size: int) -> Any:
    return _make("Granite", vocab_size=vocab_size, logits_scaling=0.25, **_SIZES)


def cohere(vocab_size: int) -> Any:
    return _make("Cohere", vocab_size=vocab_size, logit_scale=0.25, **_SIZES)


def biased(vocab_size: int) -> Any:
    """A head with a bias, as Phi has."""
    model = _make("Phi", vocab_size=vocab_size, **_SIZES)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


class UnsplittableHead(torch.nn.Linear):
    """A head that does more to hidden states than any family is known to do."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) ** 2 / 4


def unsplittable(vocab_size: int) -> Any:
    model = llama(vocab_size)
    head = UnsplittableHead(16, vocab_size, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


class NoKwargsConfig(transformers.LlamaConfig):
    model_type = "no_kwargs"


class NoKwargsForCausalLM(transformers.LlamaForCausalLM):
    """A model whose forward takes nothing but what it names: a Trainer then counts no labels for it."""

    config_class = NoKwargsConfig

    def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


transformers.AutoConfig.register("no_kwargs", NoKwargsConfig)
transformers.AutoModelForCausalLM.register(NoKwargsConfig, NoKwargsForCausalLM)


def no_kwargs(vocab_size: int) -> Any:
    torch.manual_seed(3)
    return NoKwargsForCausalLM(NoKwargsConfig(vocab_size=vocab_size, max_position_embeddings=64, **_SIZES)).eval()


#: Families whose head is split off.
SPLITTABLE: dict[str, Callable[[int], Any]] = {
    "llama": llama,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "granite": granite,
    "cohere": cohere,
    "biased": biased,
}
FAMILIES = {**SPLITTABLE, "unsplittable": unsplittable}
