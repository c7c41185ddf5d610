"""Judging models that answer with numbers: scores or embeddings, all of them gathered, then measured at once.

What these tasks are judged by (correlations, rankings) is no mean over rows, so all answers of a model are kept: 4
bytes per row and output. Which numbers a task is judged by is in `measures`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm.auto import tqdm

from kdcache.cache import Cache
from kdcache.evaluate.measures import Answers, Metrics, measures_of
from kdcache.evaluate.table_rows import ModelRow
from kdcache.schema import OUTPUTS_FIELD
from kdcache.students import Student
from kdcache.tasks import task_of
from kdcache.torch_data import count_tokens, to_tensors


def judge_answers(
    cache: Cache,
    students: Mapping[str, Student],
    batches: Sequence[list[int]],
    device: torch.device,
    progress: bool,
    more: Callable[[Answers], Metrics] = lambda answers: {},
) -> tuple[ModelRow, dict[str, ModelRow], int]:
    """Return the teacher's row, the students' by name, and the number of rows; ``more`` gives further metrics."""
    measure = measures_of(cache.manifest.task)
    own = _teacher_answers(cache, batches, progress)
    record = cache.manifest.teacher
    name = f"{record.name} (teacher)"
    teacher = ModelRow(model=name, num_parameters=record.num_parameters, metrics=measure(own, None) | more(own))
    rows = {}
    for name, student in students.items():
        answers, tokens_per_s = _student_answers(name, student, cache, batches, device, progress)
        rows[name] = ModelRow(
            model=name,
            num_parameters=student.num_parameters,
            metrics=measure(answers, _in_width_of(student, own)) | more(answers),
            tokens_per_s=tokens_per_s,
        )
    return teacher, rows, len(own.outputs_PC)


def _in_width_of(student: Student, own: Answers) -> Answers:
    """Return the teacher's answers as the student was trained on them: reduced, if they were."""
    if student.sentence is None or student.sentence.reduction_DC is None:
        return own
    reduced_PD = student.sentence.reduced(torch.from_numpy(own.outputs_PC)).numpy()
    return replace(own, outputs_PC=reduced_PD)


def _teacher_answers(cache: Cache, batches: Sequence[list[int]], progress: bool) -> Answers:
    found = []
    for indices in tqdm(batches, desc="teacher", unit="batch", disable=not progress):
        batch = cache.read(indices, hidden=(OUTPUTS_FIELD,))
        groups_P = np.repeat(batch.indices, np.diff(batch.position_offsets_N1))
        outputs_PC = batch.hidden[OUTPUTS_FIELD]
        labels_P = np.full(len(groups_P), np.nan, np.float32) if batch.labels_P is None else batch.labels_P
        found.append(Answers(outputs_PC, labels_P, groups_P))
    return _joined(found)


@torch.no_grad()
def _student_answers(
    name: str,
    student: Student,
    cache: Cache,
    batches: Sequence[list[int]],
    device: torch.device,
    progress: bool,
) -> tuple[Answers, float]:
    student.model.to(device)
    task, found, seconds, num_tokens = task_of(cache.manifest.task), [], 0.0, 0
    for indices in tqdm(batches, desc=name, unit="batch", disable=not progress):
        tensors = to_tensors(cache.read(indices), student.pad_id, task)
        batch = {key: value.to(device) for key, value in tensors.items()}
        started_s = time.perf_counter()
        outputs_PC = student.hidden(batch).float().cpu().numpy()
        seconds += time.perf_counter() - started_s
        num_tokens += int(count_tokens(batch))
        groups_P = np.asarray(indices)[tensors["groups"].numpy()]
        found.append(Answers(outputs_PC, tensors["label_values"].numpy(), groups_P))
    student.model.to("cpu")
    return _joined(found), num_tokens / max(seconds, 1e-9)


def _joined(parts: Iterable[Answers]) -> Answers:
    """Return all answers in the order of their sequences."""
    columns = zip(*((part.outputs_PC, part.labels_P, part.groups_P) for part in parts), strict=True)
    outputs_PC, labels_P, groups_P = (np.concatenate(arrays) for arrays in columns)
    order = np.argsort(groups_P, kind="stable")
    return Answers(outputs_PC[order], labels_P[order], groups_P[order])
