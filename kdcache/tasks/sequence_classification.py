"""Classification of a text or of a pair of texts: one position each, whose ids are the classes.

All classes are kept, so the cache has the whole distribution, exact at every temperature, and the raw logits. Labels
(column ``label``) are stored if the corpus has them; without labels students learn from the teacher alone. Too long
texts are truncated at their ends, the longer of a pair first. A document without a second text, or with an empty one,
is a single text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus import TEXT, Corpus, Encoder, Role
from kdcache.errors import ConfigError
from kdcache.fields import CLASS_LABELS, NUMBER_LABELS, SEGMENT_IDS
from kdcache.plugins import import_row
from kdcache.schema import ArrayRecord, OutputsRecord, Sequence
from kdcache.tasks.base import Gives, Metrics, Sequences, Task, padded_inputs
from kdcache.tasks.documents import BuiltSequence, Document, build_sequences, joined, shorten, special_tokens, texts_of
from kdcache.tasks.labels import class_label, classes, number_label, numbers


class SequenceClassification(Task):
    """Classify texts or pairs of texts."""

    name = "sequence-classification"
    summary = "a text or a pair of texts, with its class"
    roles = (TEXT, Role("text_pair", False), Role("label", False))
    gives: ClassVar[Gives] = "classes"
    model_class = "AutoModelForSequenceClassification"
    body = "logits"
    label_array: ClassVar[ArrayRecord] = CLASS_LABELS

    def plan(
        self, corpus: Corpus, encoder: Encoder, settings: Any, outputs: OutputsRecord | None, progress: Any = None
    ) -> Sequences:
        """Build one sequence from every text or pair."""
        assert outputs is not None
        return build_sequences(corpus, settings, partial(self._build, corpus, encoder, settings, outputs), progress)

    def arrays(self, settings: Any, outputs: OutputsRecord | None) -> tuple[ArrayRecord, ...]:
        """Return segment ids (the text of a pair that a token belongs to) and the label."""
        return (SEGMENT_IDS, self.label_array)

    def pad_batch(self, sequences: list[Sequence], pad_id: int) -> dict[str, NDArray[Any]]:
        """Return ``input_ids``, ``attention_mask`` and ``token_type_ids`` [B, L], and ``rows`` [B]."""
        segments = [np.asarray(sequence.segment_ids_T) for sequence in sequences]
        inputs = padded_inputs([sequence.tokens_T for sequence in sequences], pad_id, segments)
        return {**inputs, "rows": np.arange(len(sequences))}

    def label(self, value: Any, outputs: OutputsRecord, document: str) -> NDArray[Any]:
        """Return the label of a document as an array of a `Sequence`."""
        return classes([class_label(value, outputs.labels, document)])

    def _build(
        self,
        corpus: Corpus,
        encoder: Encoder,
        settings: Any,
        outputs: OutputsRecord,
        start: int,
        rows: list[Document],
    ) -> Iterator[list[BuiltSequence]]:
        firsts = texts_of(encoder, [text for text, _ in rows])
        seconds = texts_of(encoder, [more.get("text_pair") for _, more in rows])
        around = {num_parts: encoder.around(num_parts) for num_parts in ((1, 2) if any(seconds) else (1,))}
        ids = corpus.document_ids(range(start, start + len(rows)))
        for first, second, (_, more), document in zip(firsts, seconds, rows, ids, strict=True):
            label = self.label(more.get("label"), outputs, document)
            if not first:
                yield []
                continue
            parts = [first, second] if second else [first]
            specials = around[len(parts)]
            short = shorten(parts, _room(settings.max_length, specials))
            yield [BuiltSequence(*joined(short, specials), label, is_truncated=short != parts)]


def _room(max_length: int, around: list[list[int]]) -> int:
    """Return the number of tokens for the texts of a sequence."""
    num_special, num_parts = special_tokens(around), len(around) - 1
    if max_length < num_special + num_parts:
        raise ConfigError(
            f"--max-length {max_length} leaves no room for {num_parts} text{'s' * (num_parts > 1)} in addition "
            f"to {num_special} special tokens; use {num_special + num_parts} or more"
        )
    return max_length - num_special


class SequenceRegression(SequenceClassification):
    """Predict a score of texts or pairs of texts, such as a similarity."""

    name = "sequence-regression"
    summary = "a text or a pair of texts, with a score"
    gives = "outputs"
    objective: ClassVar[dict[str, Any]] = {"output_mse": {"weight": 0.5}, "label_mse": {"weight": 0.5}}
    label_array = NUMBER_LABELS

    def label(self, value: Any, outputs: OutputsRecord, document: str) -> NDArray[Any]:
        """Return the label of a document as an array of a `Sequence`."""
        return numbers([number_label(value, document)])

    def metrics(self, answers: Any, teacher: Any) -> Metrics:
        """Return correlations with the labels and with the teacher, and the mean squared error."""
        return import_row("kdcache.evaluate.measures:regression")(answers, teacher)
