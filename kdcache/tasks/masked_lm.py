"""Masked language modelling: a row is a token that was hidden, and the teacher says what it may have been.

Masks are drawn once, when the corpus is planned, and frozen: what is stored as a sequence's tokens is what models are
fed, with the original ids of the chosen tokens as labels and their places beside them. Only they have rows, so a cache
holds a seventh of the positions that a causal one would. A document with several ``replicas`` is several sequences with
masks of their own. Of the chosen tokens 80% are replaced by the mask token, 10% by a random id and 10% stay as they are
(Devlin et al., "BERT", 2019, section 3.1).

Special tokens are neither chosen nor drawn. Samples depend on the seed, the document's id, the piece and the replica, so
a document gets the same masks whatever else the corpus holds, and further replicas leave the first ones as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.cache.fields import PLACES, WHOLE_LABELS
from kdcache.corpus import Corpus, Encoder
from kdcache.errors import ConfigError
from kdcache.plugins import import_row
from kdcache.schema import ArrayRecord, OutputsRecord, Sequence
from kdcache.tasks.base import Sequences, Task, TaskSettings, padded_inputs
from kdcache.tasks.documents import Made, Row, joined, make_sequences, special_tokens, texts_of


class MaskingSettings(TaskSettings):
    """How tokens are hidden; longer documents are cut into sequences of ``max_length`` tokens."""

    mask_prob: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that get a row; at least one of every sequence does."""
    random_share: float = Field(default=0.1, ge=0, le=0.5)
    """Of the chosen tokens: replaced by a random id instead of the mask token."""
    kept_share: float = Field(default=0.1, ge=0, le=0.5)
    """Of the chosen tokens: fed as they are."""
    replicas: int = Field(default=1, ge=1, le=1000)
    """Sequences with masks of their own that every piece of text becomes."""
    seed: int = Field(default=0, ge=0, lt=2**32)


class MaskedLM(Task):
    """Predict hidden tokens: BERT-like models."""

    name = "masked-lm"
    summary = "a hidden token (BERT-like)"
    settings = MaskingSettings
    model_class = "AutoModelForMaskedLM"
    body = "head-input"

    def plan(
        self, corpus: Corpus, encoder: Encoder, settings: Any, outputs: OutputsRecord | None, progress: Any = None
    ) -> Sequences:
        """Cut documents into pieces and draw the masks of every replica."""
        if encoder.mask_id is None:
            raise ConfigError("task masked-lm needs a tokenizer with a mask token, and this one has none")
        return make_sequences(corpus, settings, partial(_make, corpus, encoder, settings), progress)

    def arrays(self, settings: Any, outputs: OutputsRecord | None) -> tuple[ArrayRecord, ...]:
        """The hidden ids and where they are."""
        return (WHOLE_LABELS, PLACES)

    def pad_batch(self, sequences: list[Sequence], pad_id: int) -> dict[str, NDArray[Any]]:
        """Return ``input_ids`` and ``attention_mask`` [B, L], and ``rows`` [P]: the chosen tokens."""
        inputs = padded_inputs([sequence.tokens_T for sequence in sequences], pad_id)
        longest = inputs["input_ids"].shape[1]
        places = [np.asarray(s.token_index_L, np.int64) + n * longest for n, s in enumerate(sequences)]
        return {**inputs, "rows": np.concatenate(places)}

    def view(self, context: Any) -> Any:
        """Return the masked tokens with the teacher's predictions."""
        return import_row("kdcache.peek.tokens:masked")(context)


def _make(
    corpus: Corpus, encoder: Encoder, settings: MaskingSettings, start: int, rows: list[Row]
) -> Iterator[list[Made]]:
    around, hider = encoder.around(1), _Hider(encoder, settings)
    size = settings.max_length - special_tokens(around)
    documents = corpus.document_ids(range(start, start + len(rows)))
    for document, ids in zip(documents, texts_of(encoder, [text for text, _ in rows]), strict=True):
        made = []
        for first in range(0, len(ids), size):
            tokens_T, _ = joined([ids[first : first + size]], around)
            candidates = hider.candidates(tokens_T, len(around[0]), len(around[1]))
            for replica in range(settings.replicas if len(candidates) else 0):
                fed, places = hider.hide(tokens_T, candidates, _generator(settings.seed, document, first, replica))
                labels = tokens_T[places].astype(np.int64)
                suffix = f"#{replica}" if settings.replicas > 1 else ""
                made.append(Made(fed, None, labels, places.astype(np.uint32), token_offset=first, suffix=suffix))
        yield made


def _generator(seed: int, document: str, token_offset: int, replica: int) -> np.random.Generator:
    """Return a generator for one replica of one piece, which nothing else of the corpus has a part in."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little"), token_offset, replica])


class _Hider:
    """Chooses tokens and hides them."""

    def __init__(self, encoder: Encoder, settings: MaskingSettings) -> None:
        assert encoder.mask_id is not None
        self._settings, self._mask_id = settings, encoder.mask_id
        self._special = np.array(sorted(encoder.special_ids))
        self._ordinary = np.setdiff1d(np.arange(encoder.num_ids), self._special)

    def candidates(self, tokens_T: NDArray[np.uint32], num_before: int, num_after: int) -> NDArray[np.int64]:
        """Return the places of all tokens that may be chosen.

        Not those around the text, nor special tokens in it: an unknown word is no answer to learn.
        """
        places = np.arange(num_before, len(tokens_T) - num_after)
        return places[~np.isin(tokens_T[places], self._special)]

    def hide(
        self, tokens_T: NDArray[np.uint32], candidates: NDArray[np.int64], generator: np.random.Generator
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the tokens as models are fed them, and the places that were chosen, ascending."""
        settings = self._settings
        chosen = candidates[generator.random(len(candidates)) < settings.mask_prob]
        if not len(chosen):
            chosen = generator.choice(candidates, 1)
        fate = generator.random(len(chosen))
        fed = tokens_T.copy()
        is_random = fate < settings.random_share
        is_hidden = fate >= settings.random_share + settings.kept_share
        fed[chosen[is_hidden]] = self._mask_id
        fed[chosen[is_random]] = generator.choice(self._ordinary, int(is_random.sum()))
        return fed, chosen
