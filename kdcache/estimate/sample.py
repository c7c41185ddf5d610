"""The sample that presets are measured on: sequences, and the teacher's logits at their positions.

Logits of all positions never exist at once. They come in chunks, in order, and every measurement takes what it needs
from a chunk before the next one is made. Normally a chunk is a product of last hidden states and the LM head, so a
second walk does not run the teacher again; a teacher without a separable head does run again.

Shape suffixes: P positions, C positions of a chunk, V vocabulary, D width, N sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.models.batching import batches_in_order
from kdcache.models.lm_head import BufferedHead, LMHead
from kdcache.schema import Sequence
from kdcache.tasks import TASKS, Task
from kdcache.tasks.causal_lm import CausalLM
from kdcache.teachers.logits import LogitsTeacher
from kdcache.teachers.reduce import ChunkSizes


class Logits(Protocol):
    """The teacher's logits at all positions of a sample, over its true vocabulary."""

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield consecutive rows and their logits [C, V], in the teacher's dtype, valid until the next chunk."""
        ...


class HeadLogits:
    """Logits from last hidden states (float32 [P, D]) and the LM head, in the dtype of the head."""

    def __init__(self, states_PD: NDArray[np.float32], head: LMHead) -> None:
        self.states_PD, self.head = states_PD, head
        self._size = ChunkSizes.for_device(head.weight_VD.device).head
        self._buffered = BufferedHead(head)

    @torch.inference_mode()
    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.states_PD), self._size):
            rows = slice(start, min(start + self._size, len(self.states_PD)))
            yield rows, self.of(self.states_PD[rows])

    @torch.inference_mode()
    def of(self, states_CD: NDArray[np.float32]) -> Tensor:
        """Return the logits [C, V] of a chunk of states; valid until the next call."""
        weight_VD = self.head.weight_VD
        states = torch.from_numpy(states_CD).to(weight_VD.device, weight_VD.dtype)
        return self._buffered.logits(states, 0, len(states))


class TeacherLogits:
    """Logits of a teacher without a separable head: it runs on the sequences each time."""

    def __init__(self, teacher: LogitsTeacher, sequences: list[Sequence], batch_tokens: int) -> None:
        self._teacher, self._sequences, self._batch_tokens = teacher, sequences, batch_tokens

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        lengths_N = np.array([sequence.num_fed for sequence in self._sequences], dtype=np.int64)
        for group in batches_in_order(range(len(lengths_N)), lengths_N, self._batch_tokens):
            batch = [self._sequences[index] for index in group]
            output = self._teacher.run(batch)
            stop = start + len(output.labels_P)
            yield slice(start, stop), output.logits(0, stop - start)
            start = stop


@dataclass
class Sample:
    """Sequences of a corpus, their rows of the per-sequence table, and the teacher's logits at their positions.

    ``sequences`` are in the order of the corpus and keep their numbers there, on which samples depend.
    """

    sequences: list[Sequence]
    table: pa.Table
    vocab_size: int
    logits: Logits
    task: Task = TASKS[CausalLM.name]

    @cached_property
    def lengths_N(self) -> NDArray[np.int64]:
        """Positions of every sequence."""
        return np.array([s.num_positions for s in self.sequences], dtype=np.int64)

    @cached_property
    def labels_P(self) -> NDArray[np.int64]:
        """The labels of all positions."""
        return self.task.labels(self.sequences)

    @property
    def num_positions(self) -> int:
        """Number of positions, P."""
        return len(self.labels_P)

    def part(self, members: NDArray[np.int64]) -> tuple[Sample, NDArray[np.int64]]:
        """Return a sample of some of the sequences, with the same logits, and the numbers of its positions here."""
        starts = np.concatenate([[0], np.cumsum(self.lengths_N)])
        rows = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in members])
        sequences = [self.sequences[number] for number in members]
        return Sample(sequences, self.table.take(members), self.vocab_size, self.logits, self.task), rows

    @property
    def half_block(self) -> int:
        """Length of the runs of positions that belong to either half in turn.

        The tail prior is estimated on one half of the positions and measured on the other. Short runs alternate, so
        that both halves come from the same documents.
        """
        return max(1, min(1024, self.num_positions // 8))

    @cached_property
    def half_P(self) -> NDArray[np.int64]:
        """The half of every position, 0 or 1."""
        return np.arange(self.num_positions) // self.half_block % 2


def split(rows: slice, block: int) -> Iterator[slice]:
    """Cut ``rows`` at the multiples of ``block``."""
    borders = range((rows.start // block + 1) * block, rows.stop, block)
    return (slice(a, b) for a, b in pairwise([rows.start, *borders, rows.stop]))
