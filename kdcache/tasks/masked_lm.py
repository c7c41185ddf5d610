"""Masked language modelling: a position is a masked token, and the teacher predicts its id.

Masks are sampled once, when the corpus is planned: the stored tokens are the model inputs, and the original ids of the
chosen tokens are the labels, stored with their token indices. Only chosen tokens are positions, so a cache has about a
seventh of the positions of a causal one. With ``replicas`` a document becomes several sequences with masks of their
own. Of the chosen tokens 80% are replaced by the mask token, 10% by a random id, and 10% are unchanged (Devlin et al.,
"BERT", 2019, section 3.1).

Special tokens are neither chosen nor sampled. Masks depend on the seed, the id of the document, the piece and the
replica: a document gets the same masks whatever else is in the corpus, and more replicas do not change the first ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.corpus import Corpus, Encoder
from kdcache.errors import ConfigError
from kdcache.fields import CLASS_LABELS, TOKEN_INDEX
from kdcache.plugins import import_row
from kdcache.schema import ArrayRecord, OutputsRecord, Sequence
from kdcache.tasks.base import Sequences, Task, TaskSettings, padded_inputs
from kdcache.tasks.documents import BuiltSequence, Document, build_sequences, joined, special_tokens, texts_of


class MaskingSettings(TaskSettings):
    """How tokens are masked; longer documents are split into sequences of ``max_length`` tokens."""

    mask_prob: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are chosen; at least one of every sequence is."""
    random_share: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the chosen tokens that are replaced by a random id instead of the mask token."""
    kept_share: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the chosen tokens that are unchanged in the input."""
    replicas: int = Field(default=1, ge=1, le=1000)
    """Number of sequences, each with its own masks, that are made from every piece of text."""
    seed: int = Field(default=0, ge=0, lt=2**32)


class MaskedLM(Task):
    """Predict masked tokens: BERT-like models."""

    name = "masked-lm"
    summary = "a masked token (BERT-like)"
    settings = MaskingSettings
    model_class = "AutoModelForMaskedLM"
    body = "head-input"

    def plan(
        self, corpus: Corpus, encoder: Encoder, settings: Any, outputs: OutputsRecord | None, progress: Any = None
    ) -> Sequences:
        """Split documents into pieces and sample the masks of every replica."""
        if encoder.mask_id is None:
            raise ConfigError(
                "task masked-lm needs a tokenizer with a mask token, and this one has none; choose a masked language "
                "model, such as a BERT"
            )
        return build_sequences(corpus, settings, partial(_build, corpus, encoder, settings), progress)

    def arrays(self, settings: Any, outputs: OutputsRecord | None) -> tuple[ArrayRecord, ...]:
        """Return the original ids of the chosen tokens, and their token indices."""
        return (CLASS_LABELS, TOKEN_INDEX)

    def pad_batch(self, sequences: list[Sequence], pad_id: int) -> dict[str, NDArray[Any]]:
        """Return ``input_ids`` and ``attention_mask`` [B, L], and ``rows`` [P]: the chosen tokens."""
        inputs = padded_inputs([sequence.tokens_T for sequence in sequences], pad_id)
        longest = inputs["input_ids"].shape[1]
        rows = [np.asarray(s.token_index_L, np.int64) + n * longest for n, s in enumerate(sequences)]
        return {**inputs, "rows": np.concatenate(rows)}

    def view(self, context: Any) -> Any:
        """Return the masked tokens with the teacher's predictions."""
        return import_row("kdcache.peek.tokens:masked")(context)


def _build(
    corpus: Corpus, encoder: Encoder, settings: MaskingSettings, start: int, rows: list[Document]
) -> Iterator[list[BuiltSequence]]:
    around, masker = encoder.around(1), _Masker(encoder, settings)
    size = settings.max_length - special_tokens(around)
    documents = corpus.document_ids(range(start, start + len(rows)))
    for document, ids in zip(documents, texts_of(encoder, [text for text, _ in rows]), strict=True):
        built = []
        for first in range(0, len(ids), size):
            tokens_T, _ = joined([ids[first : first + size]], around)
            candidates = masker.candidates(tokens_T, len(around[0]), len(around[1]))
            for replica in range(settings.replicas if len(candidates) else 0):
                fed, indices = masker.mask(tokens_T, candidates, _generator(settings.seed, document, first, replica))
                labels = tokens_T[indices].astype(np.int64)
                suffix = f"#{replica}" if settings.replicas > 1 else ""
                built.append(
                    BuiltSequence(fed, None, labels, indices.astype(np.uint32), token_offset=first, suffix=suffix)
                )
        yield built


def _generator(seed: int, document: str, token_offset: int, replica: int) -> np.random.Generator:
    """Return the generator of one replica of one piece, which does not depend on the rest of the corpus."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little"), token_offset, replica])


class _Masker:
    """Chooses tokens and masks them."""

    def __init__(self, encoder: Encoder, settings: MaskingSettings) -> None:
        assert encoder.mask_id is not None
        self._settings, self._mask_id = settings, encoder.mask_id
        self._special = np.array(sorted(encoder.special_ids))
        self._ordinary = np.setdiff1d(np.arange(encoder.num_ids), self._special)

    def candidates(self, tokens_T: NDArray[np.uint32], num_before: int, num_after: int) -> NDArray[np.int64]:
        """Return the indices of all tokens that may be chosen: those of the text that are not special tokens."""
        indices = np.arange(num_before, len(tokens_T) - num_after)
        return indices[~np.isin(tokens_T[indices], self._special)]

    def mask(
        self, tokens_T: NDArray[np.uint32], candidates: NDArray[np.int64], generator: np.random.Generator
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the tokens of the model input, and the indices of the chosen tokens, ascending."""
        settings = self._settings
        chosen = candidates[generator.random(len(candidates)) < settings.mask_prob]
        if not len(chosen):
            chosen = generator.choice(candidates, 1)
        fate = generator.random(len(chosen))
        fed = tokens_T.copy()
        is_random = fate < settings.random_share
        is_masked = fate >= settings.random_share + settings.kept_share
        fed[chosen[is_masked]] = self._mask_id
        fed[chosen[is_random]] = generator.choice(self._ordinary, int(is_random.sum()))
        return fed, chosen
