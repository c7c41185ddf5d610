"""`Task`: the positions of a sequence that are predicted, the inputs of the models, and the label of each position.

Everything downstream of a task sees positions. The teacher predicts a distribution over tokens or classes at each of
them, or a vector of numbers (``gives``); codecs, shards, reader, losses and objective do not depend on the task. A task
is used when a corpus is planned (`Task.plan`), when a batch for teacher or student is made (`Task.pad_batch`), when a
cache is read for training (`Task.collate`), and when a sequence is shown or a model evaluated (`Task.view`,
`Task.metrics`). Labels and positions are aligned here and nowhere else.

Tasks do not import torch, so models are named: ``model_class`` and ``body``, see ``kdcache.models.bodies``.

Shape suffixes: B rows of the padded grid, L its columns, P flat rows, K kept ids, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from kdcache.config import Config
from kdcache.corpus import TEXT, Corpus, Encoder, Role
from kdcache.fields import kind_of
from kdcache.plugins import import_row
from kdcache.schema import NO_LABEL, ArrayRecord, OutputsRecord, Sequence, SequenceBatch

Gives = Literal["tokens", "classes", "outputs"]

Metrics = dict[str, float | None]

#: Views and metrics stand above this layer, so they are named here and imported when they are used.
_VIEWS: dict[Gives, str] = {
    "tokens": "kdcache.peek.tokens:following",
    "classes": "kdcache.peek.answers:classes",
    "outputs": "kdcache.peek.answers:score",
}


class TaskSettings(Config):
    """How documents become sequences; ``max_length`` is the most tokens of one model input."""

    max_length: int = Field(default=256, ge=4, le=2**24)


class Sequences(Protocol):
    """All sequences of a corpus, by number; the result of `Task.plan`."""

    config: Any
    lengths_N: NDArray[np.int64]
    """Positions of every sequence."""
    num_documents: int
    num_empty: int
    num_too_short: int
    num_truncated: int

    @property
    def num_sequences(self) -> int:
        """Number of sequences, N."""
        ...

    @property
    def longest(self) -> int:
        """Most tokens of one model input."""
        ...

    @property
    def num_positions(self) -> int:
        """Positions of all sequences."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        ...

    def sequence(self, index: int) -> Sequence:
        """Return sequence ``index``."""
        ...

    def table(self) -> pa.Table:
        """Return one row for each piece of a document in a sequence."""
        ...

    def sequence_table(self, start: int, stop: int) -> pa.Table:
        """Return one row for each sequence from ``start`` to ``stop``."""
        ...


class Task(ABC):
    """Base class of tasks, which have no state."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """What is predicted, for the help text of the command line."""
    roles: ClassVar[tuple[Role, ...]] = (TEXT,)
    """The columns that are read of every document, the main text first."""
    settings: ClassVar[type[Config]] = TaskSettings
    gives: ClassVar[Gives] = "tokens"
    """What the teacher predicts: a distribution over ``tokens`` or ``classes``, or numbers (``outputs``)."""
    model_class: ClassVar[str]
    """Name of the class in transformers that loads a model of this task."""
    body: ClassVar[str]
    """Document of ``BODIES`` in ``kdcache.models.bodies``."""
    objective: ClassVar[dict[str, Any]] = {"forward_kl": {"weight": 0.9}, "cross_entropy": {"weight": 0.1}}
    """The default objective of students."""

    @property
    def unit(self) -> str:
        """The name of a position in messages: ``token``, or ``row`` where whole texts are predicted."""
        return "token" if self.gives == "tokens" else "row"

    @property
    def is_causal(self) -> bool:
        """Whether models predict a token from the tokens before it alone."""
        return self.body == "tokens"

    @abstractmethod
    def plan(
        self, corpus: Corpus, encoder: Encoder, settings: Any, outputs: OutputsRecord | None, progress: Any = None
    ) -> Sequences:
        """Tokenise ``corpus`` into sequences; ``progress`` is called with the number of documents done and in total."""

    def arrays(self, settings: Any, outputs: OutputsRecord | None) -> tuple[ArrayRecord, ...]:
        """Return the arrays of a `Sequence` that are stored in addition to tokens and loss mask."""
        return ()

    @abstractmethod
    def pad_batch(self, sequences: list[Sequence], pad_id: int) -> dict[str, NDArray[Any]]:
        """Return the padded model inputs of ``sequences``, and ``rows`` [P]: indices of the positions in the states.

        They index the flattened states of the task's body: ``states.reshape(B * L, D)[rows]`` is aligned with the flat
        arrays of a `SequenceBatch`.
        """

    def labels(self, sequences: list[Sequence]) -> NDArray[np.int64]:
        """Return the label of every position, [P] int64; `NO_LABEL` where there is none."""
        stored = [sequence.labels_L for sequence in sequences]
        if stored and stored[0] is not None and stored[0].dtype.kind == "i":
            return np.concatenate(stored).astype(np.int64)  # type: ignore[arg-type]
        return np.full(sum(sequence.num_positions for sequence in sequences), NO_LABEL, np.int64)

    def stored_labels(self, sequences: list[Sequence]) -> NDArray[Any]:
        """Return the label of every position, [P], as it is stored: floats where labels are numbers, else `labels`."""
        numbers = [s.labels_L for s in sequences if s.labels_L is not None and s.labels_L.dtype.kind == "f"]
        return np.concatenate(numbers) if numbers else self.labels(sequences)

    def view(self, context: Any) -> Any:
        """Return what ``kdcache peek`` shows of a sequence: a `kdcache.peek.View` made from a `PeekContext`.

        By default that of other tasks whose teacher gives the same.
        """
        return import_row(_VIEWS[self.gives])(context)

    def metrics(self, answers: Any, teacher: Any) -> Metrics:
        """Return metrics of the task from the `kdcache.evaluate.measures.Answers` of a model to a whole cache.

        ``teacher`` are the teacher's answers to compare a student with; None if the model is the teacher. A metric that
        cannot be computed (no labels) is None. For tasks that give tokens this is not called; for classes it adds to
        accuracy, macro F1 and the others that all tasks with classes have.
        """
        if self.gives != "outputs":
            return {}
        return import_row("kdcache.evaluate.measures:against_teacher")(answers, teacher)

    def collate(self, batch: SequenceBatch, pad_id: int) -> dict[str, NDArray[Any]]:
        """Collate decoded sequences to one training batch: `pad_batch`, labels, and the teacher's targets.

        In addition to the model inputs and ``rows``: ``labels`` [P] int64, ``loss_mask`` [P] bool, and what each field
        of the batch adds. Targets add ``teacher_ids`` [P, K] int64 and ``teacher_logprobs`` [P, K] float32 (samples are
        merged into the ids, see `Targets.merged`), ``teacher_log_tail`` [P] float32, and, if the cache stores them,
        ``teacher_gold_logprob`` and ``teacher_entropy`` [P] and ``teacher_log_tails`` [P, G], the tails at other
        temperatures. Vectors are added under their names, [P, D] float32, the last hidden state of the kind hidden
        (``batch.hidden["last"]``) as ``teacher_hidden``. Where the teacher gives numbers: ``label_values`` [P] float32,
        labels that are numbers (NaN: none), and ``groups`` [P] int64, the index of each position's sequence in the
        batch.
        """
        sequences = batch.sequences()
        found: dict[str, NDArray[Any]] = {
            **self.pad_batch(sequences, pad_id),
            "labels": self.labels(sequences),
            "loss_mask": batch.loss_mask_P.astype(bool),
        }
        for name in ("targets", *batch.hidden):
            found |= kind_of(name, batch).collate(name, batch)
        return found | (_numbers(batch) if self.gives == "outputs" else {})


def _numbers(batch: SequenceBatch) -> dict[str, NDArray[Any]]:
    num_positions_N = np.diff(batch.position_offsets_N1)
    values_P = np.full(int(num_positions_N.sum()), np.nan, np.float32) if batch.labels_P is None else batch.labels_P
    return {
        "label_values": values_P.astype(np.float32),
        "groups": np.repeat(np.arange(len(batch)), num_positions_N),
    }


def pad(arrays: list[NDArray[Any]], fill: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return arrays right-padded with ``fill``, [B, L] int64, and a mask that is False at padding, [B, L]."""
    lengths_B = np.array([len(array) for array in arrays], dtype=np.int64)
    real_BL = np.arange(int(lengths_B.max(initial=1))) < lengths_B[:, None]
    padded_BL = np.full(real_BL.shape, fill, dtype=np.int64)
    padded_BL[real_BL] = np.concatenate(arrays)
    return padded_BL, real_BL


def padded_inputs(
    tokens: list[NDArray[Any]], pad_id: int, segments: list[NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """Return ``input_ids`` and ``attention_mask`` [B, L] of some texts; with ``segments`` also ``token_type_ids``."""
    input_ids_BL, real_BL = pad(tokens, pad_id)
    inputs: dict[str, NDArray[Any]] = {"input_ids": input_ids_BL, "attention_mask": real_BL.astype(np.int64)}
    return inputs if segments is None else inputs | {"token_type_ids": pad(segments, 0)[0]}
