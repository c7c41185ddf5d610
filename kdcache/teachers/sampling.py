"""Sample texts so that each depends on the seed and the number of its document alone, not on its batch.

A token is sampled as samples of a cache are: a uniform number of (seed, document, position) inverts the cumulative sum.
The generators of torch cannot do that, because a batch shares one. Before, logits are divided by the temperature, and
of the ids in descending order the fewest that reach ``top_p`` stay (nucleus sampling: Holtzman et al., "The curious
case of neural text degeneration", 2020).

Shape suffixes: B texts of a batch, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache.teachers.samples import sample_ids, sample_uniforms


class Sampler:
    """Samples the next token of every text of one batch; ``documents`` are their numbers in the corpus."""

    def __init__(
        self, seed: int, documents: Sequence[int], max_tokens: int, *, temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        uniforms_BL = sample_uniforms(seed, documents, [1] * len(documents), max_tokens)
        self._uniforms_BL = torch.from_numpy(uniforms_BL)
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, position: int, logits_BV: Tensor) -> Tensor:
        """Return the ids [B] of the tokens at ``position``, counted from 0."""
        weights_BV = (logits_BV.float() / self._temperature).softmax(1)
        if self._top_p < 1:
            weights_BV = nucleus(weights_BV, self._top_p)
        uniforms_B1 = self._uniforms_BL[:, position : position + 1].to(logits_BV.device)
        return sample_ids(weights_BV, uniforms_B1)[:, 0]


def nucleus(weights_BV: Tensor, top_p: float) -> Tensor:
    """Return probabilities with 0 for all but the fewest most probable ids that together reach ``top_p``."""
    sorted_BV, ids_BV = weights_BV.sort(1, descending=True)
    before_BV = sorted_BV.cumsum(1) - sorted_BV
    # Nothing stands before the first id, so it always stays.
    return torch.zeros_like(weights_BV).scatter_(1, ids_BV, sorted_BV.masked_fill(before_BV >= top_p, 0))
