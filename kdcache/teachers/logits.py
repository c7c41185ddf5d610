"""Teachers that have logits: the reduction to targets, and what is done when a batch does not fit in memory.

A subclass says how a batch is run (`LogitsTeacher.run`). Its logits are reduced here, chunk by chunk, so that those of
the whole batch need not exist at once.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.tail_prior import TailSum
from kdcache.errors import TeacherError
from kdcache.models.lm_head import LMHead
from kdcache.models.trying import is_out_of_memory
from kdcache.schema import OUTPUTS_FIELD, SCALARS, Sequence, Targets, TargetsRecord, layer_field
from kdcache.teachers.base import Answer, Capabilities, Request, Teacher
from kdcache.teachers.reduce import NonFiniteLogitsError, TargetReducer
from kdcache.teachers.samples import sample_uniforms
from kdcache.words import count

log = logging.getLogger(__name__)


@dataclass
class TeacherOutput:
    """What a model gives for the P positions of a batch, sequence by sequence.

    ``logits(start, stop)`` yields rows [stop - start, V] over the true vocabulary (or the classes), on the teacher's
    device; ``hidden`` maps layer numbers to states [P, D] in the teacher's dtype. Rows of logits are valid until the
    next call. ``outputs_PC`` are raw outputs, where the task has them.
    """

    logits: Callable[[int, int], Tensor]
    labels_P: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    outputs_PC: Tensor | None = None


class LogitsTeacher(Teacher):
    """A teacher with the logits of the whole vocabulary.

    Batches that do not fit in memory are halved, and so are later ones of that size.
    """

    capabilities = Capabilities(logits=True, scalars=SCALARS, hidden_states=True, outputs=True, packing=True)
    _reducer: TargetReducer | None = None
    _fitting_tokens: float = float("inf")

    @abstractmethod
    def run(self, sequences: SequenceOf[Sequence], layers: SequenceOf[int] = ()) -> TeacherOutput:
        """Run the model over one batch; ``layers`` are the hidden states to return."""

    @property
    def head(self) -> LMHead:
        """The LM head over the true vocabulary; raises ``TeacherError`` for a teacher without one."""
        raise TeacherError(f"{self.record.name} has no LM head; use targets of the kind top-k")

    def answer(self, sequences: SequenceOf[Sequence], request: Request) -> Answer:
        """Return targets and vectors at all positions of ``sequences``.

        Raises ``TeacherError`` for logits or vectors that are not finite, and for a sequence that does not fit in
        memory even alone.
        """
        padded = len(sequences) * max(s.num_fed for s in sequences)
        if len(sequences) > 1 and padded > self._fitting_tokens:
            return self._answer_halves(sequences, request)
        try:
            return self._answer_at_once(sequences, request)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if len(sequences) == 1:
            raise TeacherError(
                f"one sequence of {sequences[0].num_fed} positions does not fit in the memory of the teacher's "
                "device; use a smaller --max-length, another --dtype or a larger device"
            )
        # Remembered, so that later batches are halved before they fail and not after.
        self._fitting_tokens = padded / 2
        log.warning("out of memory at %d tokens; continuing with batches of at most %d", padded, padded // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._answer_halves(sequences, request)

    def _answer_halves(self, sequences: SequenceOf[Sequence], request: Request) -> Answer:
        middle = (len(sequences) + 1) // 2
        return Answer.concatenate([self.answer(half, request) for half in (sequences[:middle], sequences[middle:])])

    def _answer_at_once(self, sequences: SequenceOf[Sequence], request: Request) -> Answer:
        output = self.run(sequences, request.layers)
        try:
            targets, tail_sum = self._reduce(output, sequences, request.targets)
        except NonFiniteLogitsError as error:
            raise TeacherError(f"{error}{_where(sequences, error.row)}") from None
        vectors = {layer_field(layer): output.hidden[layer] for layer in request.layers}
        if request.outputs and output.outputs_PC is not None:
            vectors[OUTPUTS_FIELD] = output.outputs_PC
        return Answer(targets, {n: _finite_vectors(n, v, sequences) for n, v in vectors.items()}, tail_sum)

    def _reduce(
        self, output: TeacherOutput, sequences: SequenceOf[Sequence], record: TargetsRecord
    ) -> tuple[Targets, TailSum | None]:
        if record.kind == "outputs":
            return Targets.nothing(len(output.labels_P)), None
        if self._reducer is None or self._reducer.record != record:
            self._reducer = TargetReducer(record)
        targets = self._reducer(output.logits, output.labels_P, _uniforms(sequences, record))
        tail_sum = self._reducer.take_tail_sum()
        # The reduction makes all scalars; what is not asked for is left out.
        if "gold_logprob" not in record.scalars:
            targets.gold_logprob_P = None
        if "entropy" not in record.scalars:
            targets.entropy_P = None
        return targets, None if tail_sum is None else TailSum(*tail_sum)


def require_logits(teacher: Teacher, what: str) -> LogitsTeacher:
    """Return ``teacher`` as one that has logits; ``TeacherError`` says that ``what`` needs them."""
    if isinstance(teacher, LogitsTeacher) and teacher.capabilities.logits:
        return teacher
    record = teacher.record
    raise TeacherError(
        f"{what} needs the logits of the whole vocabulary, which teacher backend {record.backend!r} does not give for "
        f"{record.name}; use a backend that does, such as transformers"
    )


def hidden_to_numpy(states_PD: Tensor) -> NDArray[np.float32]:
    """Return hidden states as float32 on the CPU."""
    return states_PD.float().cpu().numpy()


def _uniforms(sequences: SequenceOf[Sequence], record: TargetsRecord) -> NDArray[Any] | None:
    if not record.num_samples:
        return None
    lengths = [s.num_positions for s in sequences]
    return sample_uniforms(record.seed, [s.index for s in sequences], lengths, record.num_samples)


def _finite_vectors(name: str, vectors: Tensor, sequences: SequenceOf[Sequence]) -> NDArray[np.float32]:
    vectors_PD = hidden_to_numpy(vectors)
    bad_P = ~np.isfinite(vectors_PD).all(axis=1)
    if bad_P.any():
        where = _where(sequences, int(np.argmax(bad_P)))
        raise TeacherError(
            f"the teacher's {name} is NaN or infinite at {count(int(bad_P.sum()), 'position')} of a batch{where}"
        )
    return vectors_PD


def _where(sequences: SequenceOf[Sequence], row: int) -> str:
    ends = np.cumsum([s.num_positions for s in sequences])
    number = int(np.searchsorted(ends, row, side="right"))
    position = row - (int(ends[number - 1]) if number else 0)
    return (
        f" (sequence {sequences[number].index}, position {position}). Nothing of this batch was written; try another "
        "--dtype (float16 overflows in many models) or check the weights"
    )
