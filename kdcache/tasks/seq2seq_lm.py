"""Encoder-decoder models: a row is a token of the target, and the teacher says what it may be.

A sequence is the input with its special tokens, then the target with its own (T5 ends both with EOS). The decoder is
fed the target shifted to the right by one, behind the token that this family of models begins with; the labels are the
target's tokens and are not stored. Targets are the corpus's own or the teacher's: for the latter let the teacher write
them first (``kdcache write-targets``), which makes a corpus like any other.

Input and target are encoded alike. Tokenizers that treat them differently are refused: those of Marian, which have two
vocabularies, and of mBART and NLLB, which put the code of a language around a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.cache.fields import SEGMENT_IDS
from kdcache.corpus import Corpus, Encoder, Role
from kdcache.errors import ConfigError, CorpusError
from kdcache.plugins import import_row
from kdcache.schema import ArrayRecord, OutputsRecord, Sequence
from kdcache.tasks.base import Sequences, Task, TaskSettings, pad, padded_inputs
from kdcache.tasks.documents import Made, Row, joined, make_sequences, special_tokens, texts_of

TokenArray = NDArray[np.uint32]


class Seq2SeqSettings(TaskSettings):
    """Longer inputs and targets are cut at their ends; both lengths count special tokens."""

    max_length: int = Field(default=512, ge=4, le=2**24)
    max_target_length: int = Field(default=128, ge=2, le=2**16)
    prefix: str = ""
    """Text before every input, such as ``summarize: ``."""


class Seq2SeqLM(Task):
    """Write a target for an input: T5-like models."""

    name = "seq2seq-lm"
    summary = "a token of the target (T5-like)"
    roles = (Role("input"), Role("target"))
    settings = Seq2SeqSettings
    model_class = "AutoModelForSeq2SeqLM"
    body = "head-input"

    def plan(
        self, corpus: Corpus, encoder: Encoder, settings: Any, outputs: OutputsRecord | None, progress: Any = None
    ) -> Sequences:
        """Make one sequence of every pair of input and target."""
        return make_sequences(corpus, settings, partial(_make, encoder, settings), progress)

    def arrays(self, settings: Any, outputs: OutputsRecord | None) -> tuple[ArrayRecord, ...]:
        """Which tokens are the target."""
        return (SEGMENT_IDS,)

    def labels(self, sequences: list[Sequence]) -> NDArray[np.int64]:
        """Return the tokens of the targets, [P] int64."""
        return np.concatenate([target_of(sequence) for sequence in sequences]).astype(np.int64)

    def pad_batch(self, sequences: list[Sequence], pad_id: int) -> dict[str, NDArray[Any]]:
        """Return ``input_ids`` and ``attention_mask`` [B, L] of the encoder, ``target_ids`` [B, D] and ``rows`` [P].

        The body makes the decoder's inputs of the targets, because only the model knows the token to begin with.
        """
        inputs = padded_inputs([source_of(s) for s in sequences], pad_id)
        target_ids_BD, real_BD = pad([target_of(s) for s in sequences], pad_id)
        return {**inputs, "target_ids": target_ids_BD, "rows": np.flatnonzero(real_BD)}

    def view(self, context: Any) -> Any:
        """Return the input, and positions of the target."""
        return import_row("kdcache.peek.tokens:written")(context)


def source_of(sequence: Sequence) -> TokenArray:
    """Return the tokens that the encoder is fed."""
    return sequence.tokens_T[np.asarray(sequence.segment_ids_T) == 0]


def target_of(sequence: Sequence) -> TokenArray:
    """Return the tokens of the target."""
    return sequence.tokens_T[np.asarray(sequence.segment_ids_T) == 1]


def fed_inputs(encoder: Encoder, settings: Seq2SeqSettings, texts: list[str]) -> tuple[list[TokenArray], list[bool]]:
    """Return what the encoder is fed of every input, with prefix and special tokens, and which of them were cut.

    Nothing of an empty input: a prefix alone asks for nothing. Raises ``ConfigError`` when lengths leave no room for
    any text, or the tokenizer treats targets differently.
    """
    _check_encoder(encoder, settings)
    around = encoder.around(1)
    room = settings.max_length - special_tokens(around)
    with_prefix = texts_of(encoder, texts, settings.prefix)
    fed: list[TokenArray] = []
    for text, tokens in zip(texts, with_prefix, strict=True):
        fed.append(joined([tokens[:room]], around)[0] if text.strip() else np.zeros(0, np.uint32))
    return fed, [len(tokens) > room for tokens in with_prefix]


def _make(encoder: Encoder, settings: Seq2SeqSettings, start: int, rows: list[Row]) -> Iterator[list[Made]]:
    around = encoder.around(1)
    inputs, is_cut_N = fed_inputs(encoder, settings, [text for text, _ in rows])
    targets = texts_of(encoder, [_text(more["target"], start + n) for n, (_, more) in enumerate(rows)])
    for source, target, is_cut in zip(inputs, targets, is_cut_N, strict=True):
        if not len(source) or not target:
            yield []
            continue
        whole = joined([target], around)[0]
        # The end of a target that was cut is left off: a student must not learn to stop in the middle of a sentence.
        fed = whole[: settings.max_target_length]
        segments = np.repeat(np.arange(2, dtype=np.uint16), [len(source), len(fed)])
        is_cut |= len(fed) < len(whole)
        yield [Made(np.concatenate([source, fed]), segments, num_rows=len(fed), is_truncated=is_cut)]


def _check_encoder(encoder: Encoder, settings: Seq2SeqSettings) -> None:
    if not encoder.treats_targets_alike:
        raise ConfigError(
            "the tokenizer encodes targets in another way than inputs (as those of Marian, mBART and NLLB do), and "
            "task seq2seq-lm encodes both alike so far; choose another teacher, such as a T5 or a BART"
        )
    before, after = encoder.around(1)
    if settings.max_length <= len(before) + len(after):
        raise ConfigError(
            f"max_length {settings.max_length} has no room for an input beside the tokenizer's "
            f"{len(before) + len(after)} special tokens; use a larger one"
        )
    if settings.max_target_length <= len(before):
        raise ConfigError(
            f"max_target_length {settings.max_target_length} has no room for a target behind the tokenizer's "
            f"{len(before)} special tokens; use a larger one"
        )


def _text(target: Any, document: int) -> str | None:
    if target is None or isinstance(target, str):
        return target if target is None or target.strip() else None
    raise CorpusError(
        f"document {document}: expected a text as target, found {type(target).__name__} {str(target)[:40]!r}; choose "
        "another column with --column target=NAME, or make it a text"
    )
