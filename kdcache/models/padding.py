"""Check by trying whether the outputs of a model depend on the padding of its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.models.bodies import Logits
from kdcache.models.trying import in_eval_mode
from kdcache.tasks.base import padded_inputs

#: Tokens of the longest text that a classifier is tried with; the shortest has three.
_LONGEST = 16


@torch.no_grad()
def depends_on_padding(model: Any) -> bool:
    """Return whether the logits of a text change next to a longer one: XLNet reads the last column, which is padding.

    Encoder-decoders find the end of a text by its EOS and are not tried.
    """
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        return False
    body, device = Logits(model), next(model.parameters()).device
    pad_id = getattr(config, "pad_token_id", None)
    ids = [n for n in range(config.vocab_size)[-_LONGEST - 1 :] if n != pad_id]
    texts = [np.resize(np.array(ids[n:], np.uint32), 3 + n) for n in range(_LONGEST - 2)]

    def answers(batch: list[NDArray[np.uint32]]) -> Tensor:
        fed = {name: torch.from_numpy(array).to(device) for name, array in padded_inputs(batch, 0).items()}
        states: Tensor = body(**fed).last_hidden_state
        return states

    with in_eval_mode(model):
        alone, together = [answers([text]) for text in texts], answers(texts)
    pairs = [(a.float()[0], t.float()[: a.shape[1]]) for a, t in zip(alone, together, strict=True)]
    size = max(float(a.abs().max()) for a, _ in pairs)
    eps = torch.finfo(alone[0].dtype).eps
    return max(float((a - t).abs().max()) for a, t in pairs) > max(16 * eps, 1e-3) * size
