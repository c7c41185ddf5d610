"""From sequences to the teacher's answers, in the order of the shard that they go into."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.tail_prior import TailSum
from kdcache.errors import TeacherError
from kdcache.fields import TARGETS_FIELD, TOKENS_FIELD, FieldKind, known_fields
from kdcache.models.batching import batches_by_length
from kdcache.schema import OUTPUTS_FIELD, Plan, Samples, Sequence, Targets, TargetsRecord, layer_field
from kdcache.teachers.base import Answer, Request, Teacher, add_tail_sums


def request_of(plan: Plan) -> Request:
    """Return what ``plan`` asks of the teacher."""
    own = {TOKENS_FIELD, TARGETS_FIELD, OUTPUTS_FIELD, *plan.hidden_layers}
    return Request(
        plan.targets,
        tuple(plan.layer_widths),
        outputs=plan.outputs is not None,
        packed=plan.is_packed,
        fields=tuple(record for record in plan.fields if record.name not in own),
    )


def answers(
    teacher: Teacher, sequences: list[Sequence], request: Request, batch_tokens: int
) -> Iterator[tuple[list[Sequence], Answer]]:
    """Ask ``teacher`` about ``sequences`` in batches of similar length; yield each batch with its answer.

    Up to ``teacher.capabilities.concurrency`` batches are answered at once. Raises ``TeacherError`` for an answer that
    is not what was asked for.
    """
    batches = deque(_batches(teacher, sequences, batch_tokens))
    if teacher.capabilities.concurrency <= 1:
        while batches:
            batch = batches.popleft()
            yield batch, _checked(teacher.answer(batch, request), batch, request)
        return
    with ThreadPoolExecutor(teacher.capabilities.concurrency, thread_name_prefix="kdcache-teacher") as pool:
        pending: deque[tuple[list[Sequence], Future[Answer]]] = deque()
        try:
            while batches or pending:
                while batches and len(pending) < teacher.capabilities.concurrency:
                    batch = batches.popleft()
                    pending.append((batch, pool.submit(teacher.answer, batch, request)))
                batch, future = pending.popleft()
                yield batch, _checked(future.result(), batch, request)
        finally:
            for _, future in pending:
                future.cancel()


def _batches(teacher: Teacher, sequences: list[Sequence], batch_tokens: int) -> Iterator[list[Sequence]]:
    for group in batches_by_length(np.array([s.num_fed for s in sequences]), batch_tokens):
        size = teacher.capabilities.max_batch_sequences or len(group)
        for start in range(0, len(group), size):
            yield [sequences[n] for n in group[start : start + size]]


def _checked(answer: Answer, batch: list[Sequence], request: Request) -> Answer:
    """Return ``answer`` after a look at its shape: a backend of another package may be wrong about it."""
    num_positions = sum(s.num_positions for s in batch)
    wanted = request.targets
    found = {"ids_PK": answer.targets.ids_PK.shape, "logprobs_PK": answer.targets.logprobs_PK.shape}
    for name, shape in found.items():
        if shape != (num_positions, wanted.top_k):
            raise TeacherError(
                f"the teacher answered {name} of shape {shape} for a batch of {num_positions} positions and top_k "
                f"{wanted.top_k}; the backend must give exactly these"
            )
    for name in ("gold_logprob", "entropy"):
        if name in wanted.scalars and getattr(answer.targets, f"{name}_P") is None:
            raise TeacherError(f"the teacher gave no {name}, which targets.scalars asks for; correct the backend")
    for name in (layer_field(layer) for layer in request.layers):
        if name not in answer.vectors:
            raise TeacherError(f"the teacher gave no {name}, which was asked for; correct the backend")
    return answer


def staged(answer: Answer, fields: Mapping[str, FieldKind]) -> dict[str, Any]:
    """Return the rows of ``answer`` as they wait for their shard, by field.

    Raises ``TeacherError`` for a field that the answer lacks, and for numbers that the field cannot hold.
    """
    found: dict[str, Any] = {}
    for name, field in fields.items():
        if name == TOKENS_FIELD:
            continue
        if name != TARGETS_FIELD and name not in answer.vectors:
            raise TeacherError(f"the teacher gave no {name}, which the plan stores; correct the backend")
        found[name] = field.stage(answer.targets if name == TARGETS_FIELD else answer.vectors[name])
    return found


class ShardRows:
    """The positions of one shard, filled batch by batch in any order."""

    def __init__(
        self,
        lengths_N: NDArray[np.int64],
        first_sequence: int,
        record: TargetsRecord,
        codecs: Mapping[str, FieldKind],
    ) -> None:
        self._first = first_sequence
        self._offsets = np.concatenate([[0], np.cumsum(lengths_N)])
        self._codecs = codecs
        self.targets = _empty_targets(int(self._offsets[-1]), record)
        self.hidden: dict[str, NDArray[Any]] = {}
        self.tail_sum: TailSum | None = None

    def put(self, sequences: list[Sequence], answer: Answer) -> None:
        """Store the answer to one batch at the positions of its sequences."""
        spans = [s.index - self._first for s in sequences]
        rows = np.concatenate([np.arange(self._offsets[n], self._offsets[n + 1]) for n in spans])
        for name, values in vars(answer.targets).items():
            if name != "samples" and getattr(self.targets, name) is not None:
                getattr(self.targets, name)[rows] = values
        if answer.targets.samples is not None and self.targets.samples is not None:
            for name, values in vars(answer.targets.samples).items():
                getattr(self.targets.samples, name)[rows, : values.shape[1]] = values
        for name, codec in self._codecs.items():
            staged = codec.stage(answer.vectors[name])
            if name not in self.hidden:
                self.hidden[name] = codec.allocate(staged, len(self.targets.ids_PK))
            codec.put(self.hidden[name], rows, staged)
        self.tail_sum = add_tail_sums(iter((self.tail_sum, answer.tail_sum)))


def vector_codecs(plan: Plan) -> dict[str, FieldKind]:
    """Return every field of rows at positions, in addition to the targets."""
    fields = known_fields(plan).items()
    return {name: field for name, field in fields if name not in (TOKENS_FIELD, TARGETS_FIELD) and field.axis != "tokens"}


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
        gold_logprob_P=zeros() if "gold_logprob" in record.scalars else None,
        entropy_P=zeros() if "entropy" in record.scalars else None,
        num_kept_P=zeros(dtype=np.int32) if record.is_ragged else None,
        log_tails_PG=zeros(len(record.temperatures)) if record.temperatures else None,
        samples=Samples(zeros(num_samples, dtype=np.int32), zeros(num_samples, dtype=np.int32))
        if num_samples
        else None,
    )
