"""Check whether a model keeps the documents of a packed window apart.

Nothing forces it to: transformers separates documents where position ids restart, but only in families whose attention
asks for it. ALiBi models (BLOOM, MPT, Falcon), OPT and recurrent models (Mamba, RWKV) silently read across the border.
So it is measured: the logits of the second document are compared with those of the document alone, and with those of
both read as one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.models.trying import in_eval_mode
from kdcache.schema import Sequence
from kdcache.tasks import task_of

_LENGTH = 12


@torch.no_grad()
def keeps_documents_apart(model: Any, vocab_size: int) -> bool:
    """Return whether a document in a packed window gets the logits that it gets alone (in eval mode)."""
    generator = np.random.default_rng(0)
    both = generator.integers(0, vocab_size, 2 * _LENGTH).astype(np.uint32)
    segments = np.repeat(np.arange(2, dtype=np.uint16), _LENGTH)
    with in_eval_mode(model):
        alone, packed, joint = (
            _last_rows(model, *inputs) for inputs in ((both[_LENGTH:], None), (both, segments), (both, None))
        )
    # In another batch shape logits round differently, depending on dtype and depth; reading across changes far more.
    return not bool((packed - alone).abs().mean() > 0.25 * (joint - alone).abs().mean())


def _last_rows(model: Any, tokens_T: NDArray[np.uint32], segment_ids_T: NDArray[np.uint16] | None) -> Tensor:
    sequence = Sequence(0, tokens_T, np.ones(len(tokens_T) - 1, np.uint8), segment_ids_T)
    batch = task_of("causal-lm").pad_batch([sequence], pad_id=0)
    device = next(model.parameters()).device
    inputs = {n: torch.from_numpy(v).to(device) for n, v in batch.items() if n != "rows"}
    logits: Tensor = model(**inputs, use_cache=False).logits[0, 1 - _LENGTH :]
    return logits.float()
