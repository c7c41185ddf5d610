from __future__ import annotations

import torch
import transformers

from kdcache.models.packing import keeps_documents_apart
from tests.families import FAMILIES
from tests.loops import loop

#: Families that read across the documents of a window, each in its own way: ALiBi, a mask of its own, recurrence.
READ_ACROSS = {
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=60,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            init_std=0.3,
        )
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
}


@loop("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@loop("family", FAMILIES)
def test_families_that_keep_documents_apart(family, dtype):
    model = FAMILIES[family](60).to(dtype).train()
    assert keeps_documents_apart(model, 60)
    assert model.training


@loop("family", READ_ACROSS)
def test_families_that_do_not(family):
    torch.manual_seed(0)
    assert not keeps_documents_apart(READ_ACROSS[family](), 60)
