"""Bi-encoders: query and document become one vector each, and their score is a product of the two.

A cache of rankings holds pairs as a cross-encoder reads them. A bi-encoder finds both texts in the same tokens: token
types say where a document begins, and the special tokens that the tokenizer puts around one text and two say which
tokens are special. So each text is fed exactly as it would be alone, whatever the template (BERT's ``[CLS] query [SEP]
document [SEP]``, RoBERTa's two ``</s>`` between them), cut where the pair was cut. The positions of one query stand
next to each other, and their query is fed once.

The settings of a bi-encoder stand in the model's own configuration. So a saved student is a plain encoder whose
configuration says how to use it, and a directory of sentence-transformers; its linear layer, if there is one, is run
here too.

Shape suffixes: P pairs, Q queries, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcache.config import Config
from kdcache.models.pooling import pool, project
from kdcache.models.tokenizer import TextEncoder

#: Member of a Hugging Face configuration that stores the settings.
CONFIG_KEY = "kdcache_bi_encoder"


class BiEncoderConfig(Config):
    """How two texts get a score: ``scale`` x the ``similarity`` of their pooled states.

    A cosine lies between -1 and 1 and wants a scale of about 20 to reach the differences of a cross-encoder's scores;
    for a dot product take 1.
    """

    pooling: Literal["mean", "cls", "last"] = "mean"
    similarity: Literal["cosine", "dot"] = "cosine"
    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)


class _Saved(BiEncoderConfig):
    """What the configuration of a model stores: the settings, and the special tokens around one text and two."""

    around_one: tuple[tuple[int, ...], tuple[int, ...]]
    around_two: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def is_bi_encoder(model_config: Any) -> bool:
    """Whether a Hugging Face configuration is that of a saved bi-encoder."""
    return bool(getattr(model_config, CONFIG_KEY, None))


def mark_bi_encoder(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> BiEncoderConfig:
    """Write into the model's configuration how it scores pairs, and return it.

    Settings that ``settings`` does not name keep their stored values.
    """
    known = getattr(model.config, CONFIG_KEY, None) or {}
    encoder = TextEncoder(tokenizer)
    around = {"around_one": encoder.around(1), "around_two": encoder.around(2)}
    saved = _Saved.model_validate({**known, **settings, **around})
    setattr(model.config, CONFIG_KEY, saved.model_dump(mode="json"))
    return saved


@dataclass
class Scores:
    """Scores [P, 1, 1] of the pairs, as states of a grid with one column; there are no states of middle layers."""

    last_hidden_state: Tensor
    hidden_states: None = None


class BiEncoder:
    """An encoder that scores a pair by the pooled states of query and document."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encode: Callable[..., Any] = model
        """Returns the states of texts; replaced where they would depend on padding (`kdcache.models.padding`)."""
        self._saved = _Saved.model_validate(getattr(model.config, CONFIG_KEY))
        pooler = getattr(model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)  # unused: distributed training would wait for its gradients

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **ignored: Any
    ) -> Scores:
        """Score pairs [P, L]; tokens of type 1 are those of the document and what follows it."""
        kinds_PL = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        before, between, after = map(len, self._saved.around_two)
        whole_P = attention_mask.sum(1)
        first_P = ((kinds_PL == 0) & (attention_mask == 1)).sum(1)
        queries = self._alone(input_ids, torch.full_like(first_P, before), first_P - between)
        # Ids and mask together, so that padding is never taken for a token.
        distinct, query_P = torch.cat(queries, 1).unique_consecutive(dim=0, return_inverse=True)
        queries_QD = self._embed(*distinct.chunk(2, 1))
        documents_PD = self._embed(*self._alone(input_ids, first_P, whole_P - after))
        scores_P = (queries_QD[query_P] * documents_PD).sum(1) * self._saved.scale
        return Scores(scores_P[:, None, None])

    def _alone(self, ids_PL: Tensor, start_P: Tensor, stop_P: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the tokens from start to stop of every row, with what surrounds one text."""
        before, after = (ids_PL.new_tensor(tokens) for tokens in self._saved.around_one)
        length_P1 = (stop_P - start_P).clamp(min=0)[:, None]
        place_1L = torch.arange(int(length_P1.max()) + len(before) + len(after), device=ids_PL.device)[None]
        own_PL = place_1L - len(before)
        found_PL = ids_PL.gather(1, (own_PL + start_P[:, None]).clamp(0, ids_PL.shape[1] - 1))
        for number, token in enumerate(before):
            found_PL = torch.where(place_1L == number, token, found_PL)
        for number, token in enumerate(after):
            found_PL = torch.where(own_PL == length_P1 + number, token, found_PL)
        mask_PL = own_PL < length_P1 + len(after)
        return found_PL.where(mask_PL, 0), mask_PL.long()

    def _embed(self, ids_PL: Tensor, mask_PL: Tensor) -> Tensor:
        states_PLD = self.encode(input_ids=ids_PL, attention_mask=mask_PL).last_hidden_state
        pooled_PD = project(self.model, pool(states_PLD, mask_PL, self._saved.pooling))
        # With 8 bits of mantissa, scores would be too coarse to rank documents.
        pooled_PD = pooled_PD.to(torch.promote_types(pooled_PD.dtype, torch.float32))
        return nn.functional.normalize(pooled_PD, dim=1) if self._saved.similarity == "cosine" else pooled_PD
