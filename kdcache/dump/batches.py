"""From batches of sequences to the teacher's rows, in the order of the shard that they go into."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.tail_prior import TailSum
from kdcache.codecs import VectorCodec
from kdcache.errors import TeacherError
from kdcache.schema import OUTPUTS_FIELD, Samples, Sequence, Targets, TargetsRecord, TeacherRecord, layer_field
from kdcache.teachers import TeacherOutput
from kdcache.teachers.huggingface import hidden_to_numpy
from kdcache.teachers.reduce import NonFiniteLogitsError, TargetReducer
from kdcache.teachers.samples import sample_uniforms

log = logging.getLogger(__name__)


class Teacher(Protocol):
    """What a dump needs of a teacher."""

    record: TeacherRecord

    def run(self, sequences: SequenceOf[Sequence], layers: SequenceOf[int] = ()) -> TeacherOutput:
        """Run one batch."""
        ...


class BatchRunner:
    """Runs batches through the teacher and keeps their targets; halves a batch that does not fit in memory."""

    def __init__(
        self, teacher: Teacher, record: TargetsRecord, layers: SequenceOf[int], codecs: Mapping[str, VectorCodec]
    ) -> None:
        self.teacher = teacher
        self.record = record
        self._keep = TargetReducer(record)
        self.layers = list(layers)
        self._codecs = codecs
        self._fits: float = float("inf")

    def run(self, sequences: list[Sequence], emit: Callable[[list[Sequence], Targets, dict[str, Any]], None]) -> None:
        """Run ``sequences`` in as few passes as fit, handing each pass's result to ``emit``."""
        padded = len(sequences) * max(s.num_fed for s in sequences)
        if len(sequences) > 1 and padded > self._fits:
            self._run_halves(sequences, emit)
            return
        try:
            result = self._forward(sequences)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            result = None
        if result is not None:
            emit(sequences, *result)
            return
        if len(sequences) == 1:
            raise TeacherError(
                f"one sequence of {sequences[0].num_fed} positions does not fit in the memory of the teacher's "
                "device; use a smaller --max-length, another --dtype or a larger device"
            )
        # Remembered, so that later batches are halved before they fail and not after.
        self._fits = padded / 2
        log.warning("out of memory at %d tokens; going on with batches of at most %d", padded, padded // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._run_halves(sequences, emit)

    def _run_halves(self, sequences: list[Sequence], emit: Callable[..., None]) -> None:
        middle = (len(sequences) + 1) // 2
        for half in (sequences[:middle], sequences[middle:]):
            self.run(half, emit)

    def _forward(self, sequences: list[Sequence]) -> tuple[Targets, dict[str, NDArray[Any]]]:
        output = self.teacher.run(sequences, self.layers)
        try:
            targets = self._targets(output, sequences)
        except NonFiniteLogitsError as error:
            raise TeacherError(f"{error}{_place(sequences, error.row)}") from None
        vectors = {layer_field(n): output.hidden[n] for n in self.layers}
        if OUTPUTS_FIELD in self._codecs and output.outputs_PC is not None:
            vectors[OUTPUTS_FIELD] = output.outputs_PC
        return targets, {name: self._states(name, states, sequences) for name, states in vectors.items()}

    def _targets(self, output: TeacherOutput, sequences: list[Sequence]) -> Targets:
        if self.record.kind == "outputs":
            return Targets.nothing(len(output.labels_P))
        return self._keep(output.logits, output.labels_P, self._uniforms(sequences))

    def take_tail_sum(self) -> TailSum | None:
        """Return what all rows since the last call add to the tail prior; None where the targets have none."""
        found = self._keep.take_tail_sum()
        return None if found is None else TailSum(*found)

    def _uniforms(self, sequences: list[Sequence]) -> NDArray[Any] | None:
        if not self.record.num_samples:
            return None
        lengths = [s.num_positions for s in sequences]
        return sample_uniforms(self.record.seed, [s.index for s in sequences], lengths, self.record.num_samples)

    def _states(self, name: str, states: torch.Tensor, sequences: list[Sequence]) -> NDArray[Any]:
        states_PD = hidden_to_numpy(states)
        bad = ~np.isfinite(states_PD).all(axis=1)
        if bad.any():
            place = _place(sequences, int(np.argmax(bad)))
            raise TeacherError(f"the teacher's {name} is NaN or infinite at {bad.sum()} positions of a batch{place}")
        return self._codecs[name].stage(states_PD)


def _place(sequences: list[Sequence], row: int) -> str:
    ends = np.cumsum([s.num_positions for s in sequences])
    number = int(np.searchsorted(ends, row, side="right"))
    position = row - (int(ends[number - 1]) if number else 0)
    return (
        f" (sequence {sequences[number].index}, position {position}). Nothing of this batch was written; try another "
        "--dtype (float16 overflows in many models) or check the weights"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    # Only CUDA has a type of its own for it; other devices and CUDA's libraries say it in words.
    told = re.search(r"out of memory|can't allocate memory|ALLOC_FAILED", str(error))
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or told is not None


class ShardRows:
    """The rows of one shard, filled batch by batch in any order."""

    def __init__(self, lengths_N: NDArray[np.int64], first_sequence: int, record: TargetsRecord) -> None:
        self._first = first_sequence
        self._offsets = np.concatenate([[0], np.cumsum(lengths_N)])
        self.targets = _empty_targets(int(self._offsets[-1]), record)
        self.hidden: dict[str, NDArray[Any]] = {}

    def put(self, sequences: list[Sequence], targets: Targets, hidden: dict[str, NDArray[Any]]) -> None:
        """Store the result of one batch at the rows of its sequences."""
        spans = [s.index - self._first for s in sequences]
        rows = np.concatenate([np.arange(self._offsets[n], self._offsets[n + 1]) for n in spans])
        for name, values in vars(targets).items():
            if name != "samples" and values is not None:
                getattr(self.targets, name)[rows] = values
        if targets.samples is not None and self.targets.samples is not None:
            for name, values in vars(targets.samples).items():
                getattr(self.targets.samples, name)[rows, : values.shape[1]] = values
        for name, states in hidden.items():
            if name not in self.hidden:
                self.hidden[name] = np.zeros((len(self.targets.ids_PK), states.shape[1]), dtype=states.dtype)
            self.hidden[name][rows] = states


def _empty_targets(num_positions: int, record: TargetsRecord) -> Targets:
    def zeros(*shape: int, dtype: type = np.float32) -> NDArray[Any]:
        return np.zeros((num_positions, *shape), dtype=dtype)

    if record.kind == "outputs":
        return Targets.nothing(num_positions)
    top_k, num_samples = record.top_k, record.num_samples
    return Targets(
        ids_PK=zeros(top_k, dtype=np.int32),
        logprobs_PK=zeros(top_k),
        log_tail_P=zeros(),
        gold_logprob_P=zeros(),
        entropy_P=zeros(),
        num_kept_P=zeros(dtype=np.int32) if record.is_ragged else None,
        log_tails_PG=zeros(len(record.temperatures)) if record.temperatures else None,
        samples=Samples(zeros(num_samples, dtype=np.int32), zeros(num_samples, dtype=np.int32))
        if num_samples
        else None,
    )
