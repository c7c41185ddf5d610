"""From sequences to the teacher's answers, in the order of the shard that they go into."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from kdcache.errors import TeacherError
from kdcache.fields import TARGETS_FIELD, TOKENS_FIELD, FieldKind
from kdcache.models.batching import batches_by_length
from kdcache.schema import OUTPUTS_FIELD, Plan, Sequence, layer_field
from kdcache.teachers.base import Answer, Request, Teacher


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
