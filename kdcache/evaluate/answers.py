"""Evaluate models that predict numbers: scores and embeddings.

The metrics of these tasks (correlations, rankings) are not means over positions. So the outputs of a model at all
positions are collected first, 4 bytes per number, and then measured. Each task defines its metrics, see `measures`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm.auto import tqdm

from kdcache.cache import Cache
from kdcache.evaluate.measures import Answers, Metrics
from kdcache.evaluate.results import ModelRow
from kdcache.schema import OUTPUTS_FIELD
from kdcache.students import Student
from kdcache.tasks import task_of
from kdcache.torch_data import count_tokens, to_tensors


class OutputScorer:
    """Evaluate the models of a cache whose task predicts numbers; students one at a time.

    ``more`` returns further metrics, computed from all answers of a model.
    """

    def __init__(
        self,
        cache: Cache,
        batches: Sequence[list[int]],
        device: torch.device,
        progress: bool,
        more: Callable[[Answers], Metrics] = lambda answers: {},
    ) -> None:
        self._cache, self._batches, self._device, self._progress = cache, batches, device, progress
        self._task = task_of(cache.manifest.task)
        self._measure, self._more = self._task.metrics, more
        self._own = self._teacher_answers()

    def teacher(self) -> tuple[ModelRow, int]:
        """Return the teacher's row of the table, computed from the cache, and the number of positions."""
        record, own = self._cache.manifest.teacher, self._own
        metrics = self._measure(own, None) | self._more(own)
        row = ModelRow(model=f"{record.name} (teacher)", num_parameters=record.num_parameters, metrics=metrics)
        return row, len(own.outputs_PC)

    def student(self, name: str, student: Student) -> ModelRow:
        """Return the student's row of the table; ``student`` must be on the device of the evaluation."""
        answers, tokens_per_s = self._student_answers(name, student)
        return ModelRow(
            model=name,
            num_parameters=student.num_parameters,
            metrics=self._measure(answers, _in_width_of(student, self._own)) | self._more(answers),
            tokens_per_s=tokens_per_s,
        )

    def _teacher_answers(self) -> Answers:
        found = []
        for indices in tqdm(self._batches, desc="teacher", unit="batch", disable=not self._progress):
            batch = self._cache.read(indices, fields=(OUTPUTS_FIELD,))
            groups_P = np.repeat(batch.indices, np.diff(batch.position_offsets_N1))
            outputs_PC = batch.hidden[OUTPUTS_FIELD]
            labels_P = np.full(len(groups_P), np.nan, np.float32) if batch.labels_P is None else batch.labels_P
            found.append(Answers(outputs_PC, labels_P, groups_P))
        return Answers.joined(found)

    @torch.no_grad()
    def _student_answers(self, name: str, student: Student) -> tuple[Answers, float]:
        found, seconds, num_tokens = [], 0.0, 0
        for indices in tqdm(self._batches, desc=name, unit="batch", disable=not self._progress):
            tensors = to_tensors(self._cache.read(indices), student.pad_id, self._task)
            batch = {key: value.to(self._device) for key, value in tensors.items()}
            started_s = time.perf_counter()
            outputs_PC = student.hidden(batch).float().cpu().numpy()
            seconds += time.perf_counter() - started_s
            num_tokens += int(count_tokens(batch))
            groups_P = np.asarray(indices)[tensors["groups"].numpy()]
            found.append(Answers(outputs_PC, tensors["label_values"].numpy(), groups_P))
        return Answers.joined(found), num_tokens / max(seconds, 1e-9)


def _in_width_of(student: Student, own: Answers) -> Answers:
    """Return the teacher's answers, reduced by PCA if ``student`` was trained on reduced ones."""
    if student.sentence is None or student.sentence.reduction_DC is None:
        return own
    reduced_PD = student.sentence.reduced(torch.from_numpy(own.outputs_PC)).numpy()
    return replace(own, outputs_PC=reduced_PD)
