"""Named sizes of fresh students: small Llama models that can be trained on a laptop or one GPU.

They share one architecture, because sizes are what people compare; for another family give a ``config_file``.
Embeddings are tied and counted: at the 49,152 entries of a usual vocabulary they are most of a small model, and a count
without them would mislead. Heads are 32 or 64 wide, the feed-forward part is about 8/3 of the width (as Llama's), and
there is no grouped-query attention, which saves memory only at lengths that these students never see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.config import Config

if TYPE_CHECKING:
    from transformers import LlamaConfig

REFERENCE_VOCAB_SIZE = 49_152


class Size(Config):
    """Shape of a Llama student; ``num_parameters`` is exact at a vocabulary of 49,152, embeddings included."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_parameters: int


def llama_config(size: Size, vocab_size: int, **settings: Any) -> LlamaConfig:
    """Return the Hugging Face configuration of ``size`` over ``vocab_size`` ids."""
    from transformers import LlamaConfig  # takes seconds, and the table below is read by configurations

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        intermediate_size=size.intermediate_size,
        tie_word_embeddings=True,
        **settings,
    )


def _size(hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int) -> Size:
    layer = 4 * hidden_size**2 + 3 * hidden_size * intermediate_size + 2 * hidden_size
    return Size(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=intermediate_size,
        num_parameters=REFERENCE_VOCAB_SIZE * hidden_size + num_layers * layer + hidden_size,
    )


SIZES: dict[str, Size] = {
    "nano": _size(64, 4, 2, 192),  # 3.4M
    "tiny": _size(128, 4, 4, 384),  # 7.1M
    "small": _size(256, 4, 4, 704),  # 15.8M
    "base": _size(384, 6, 6, 1024),  # 29.5M
    "medium": _size(512, 6, 8, 1408),  # 44.4M
    "large": _size(768, 10, 12, 2048),  # 108.5M
}
