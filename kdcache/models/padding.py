"""Whether a model's answers depend on the padding of its batch, found by trying."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kdcache.models.bodies import Logits

#: Texts that a classifier is tried on, and the tokens that they are padded to.
_PROBES, _PROBE_TOKENS = 8, 16


@torch.no_grad()
def depends_on_padding(model: Any) -> bool:
    """Return whether the logits of a text change beside a longer one, by trying: XLNet reads the last column, padding.

    Encoder-decoders find the end of a text by its EOS and are not tried.
    """
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        return False
    body, device = Logits(model), next(model.parameters()).device
    pad_id = getattr(config, "pad_token_id", None)
    ids = [n for n in range(config.vocab_size) if n != pad_id][-_PROBE_TOKENS:]
    texts = [torch.tensor([(ids * 2)[n : n + 3 + n]], device=device) for n in range(_PROBES)]
    training = model.training
    model.eval()
    try:
        alone = [body(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state for text in texts]
        masks = [nn.functional.pad(torch.ones_like(text), (0, _PROBE_TOKENS - text.shape[1])) for text in texts]
        padded = [nn.functional.pad(text, (0, _PROBE_TOKENS - text.shape[1])) for text in texts]
        together = body(input_ids=torch.cat(padded), attention_mask=torch.cat(masks)).last_hidden_state
    finally:
        model.train(training)
    pairs = [(a.float()[0], t.float()[: a.shape[1]]) for a, t in zip(alone, together, strict=True)]
    size = max(float(a.abs().max()) for a, _ in pairs)
    eps = torch.finfo(alone[0].dtype).eps
    return max(float((a - t).abs().max()) for a, t in pairs) > max(16 * eps, 1e-3) * size
