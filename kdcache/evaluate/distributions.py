"""Judging models that answer with distributions, over tokens or classes.

Only positions whose loss mask is 1 count, and of them only those for which the corpus has an answer where that is
asked for. KL is the forward KL at temperature 1: exact when the cache is of the kind hidden or keeps the whole
vocabulary (or all classes); otherwise that of the kept ids plus one bucket for the rest, a lower bound; an unbiased
estimate where the cache holds samples. A cache of samples alone does not know the teacher's favourite token, so what needs
it is left out.

Where ids are those of classes, macro F1 stands beside, from counts that are added batch by batch; perplexity and the
kept mass, which is always 1, say nothing there and are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from kdcache.cache import Cache
from kdcache.evaluate.metrics import macro_f1
from kdcache.evaluate.table_rows import ModelRow
from kdcache.evaluate.tally import ClassCounts, Tally
from kdcache.losses import ForwardKL, TeacherContext, TeacherRows, score_positions
from kdcache.losses.from_cache import context_of
from kdcache.students import Student
from kdcache.tasks import task_of
from kdcache.torch_data import count_tokens, to_tensors


def judge_distributions(
    cache: Cache,
    students: Mapping[str, Student],
    batches: Sequence[list[int]],
    device: torch.device,
    progress: bool,
) -> tuple[ModelRow, dict[str, ModelRow], int]:
    """Return the teacher's row, the students' by name, and the number of positions that count."""
    context = context_of(cache).to(device)
    rows = {
        name: _student_row(name, student, cache, batches, context, device, progress)
        for name, student in students.items()
    }
    teacher, num_targets = _teacher_row(cache, batches, progress)
    return teacher, rows, num_targets


def _teacher_row(cache: Cache, batches: Sequence[list[int]], progress: bool) -> tuple[ModelRow, int]:
    tally, counts, task = Tally(), _class_counts(cache), task_of(cache.manifest.task)
    for indices in tqdm(batches, desc="teacher", unit="batch", disable=not progress):
        batch = cache.read(indices)
        targets = batch.targets
        labels_P = task.labels(batch.sequences())
        valid_P = batch.loss_mask_P.astype(bool)
        _count(counts, targets.top1_ids_P, labels_P, valid_P)
        tally.add(
            valid_P,
            labels_P >= 0,
            top1_prob_P=np.exp(targets.logprobs_PK[:, 0]) if targets.top_k else np.zeros(len(labels_P), np.float32),
            correct_P=targets.top1_ids_P == labels_P,
            loss_P=-targets.gold_logprob_P,
            entropy=targets.entropy_P,
            kept_mass=-np.expm1(targets.log_tail_P),
        )
    teacher = cache.manifest.teacher
    more: dict[str, Any] = {"entropy": tally.mean("entropy")}
    if counts is None:
        more["kept_mass"] = tally.mean("kept_mass")
    if not _knows_favourite(cache):
        more |= {"top1_accuracy": None, "ece": None}
    row = _row(f"{teacher.name} (teacher)", teacher.num_parameters, tally, counts, **more)
    return row, tally.num_positions


def _student_row(
    name: str,
    student: Student,
    cache: Cache,
    batches: Sequence[list[int]],
    context: TeacherContext,
    device: torch.device,
    progress: bool,
) -> ModelRow:
    student.model.to(device)
    tally, counts, seconds, num_tokens = Tally(), _class_counts(cache), 0.0, 0
    task = task_of(cache.manifest.task)
    for indices in tqdm(batches, desc=name, unit="batch", disable=not progress):
        tensors = to_tensors(cache.read(indices), student.pad_id, task)
        batch = {key: value.to(device) for key, value in tensors.items()}
        started_s = time.perf_counter()
        _score(student, batch, context, tally, counts)
        seconds += time.perf_counter() - started_s
        num_tokens += int(count_tokens(batch))
    student.model.to("cpu")
    return _row(
        name,
        student.num_parameters,
        tally,
        counts,
        kl=tally.mean("kl"),
        agreement=tally.mean("agreement") if _knows_favourite(cache) else None,
        tokens_per_s=num_tokens / max(seconds, 1e-9),
    )


@torch.no_grad()
def _score(
    student: Student,
    batch: dict[str, torch.Tensor],
    context: TeacherContext,
    tally: Tally,
    counts: ClassCounts | None,
) -> None:
    teacher = TeacherRows.from_batch(batch)
    losses = {"kl": ForwardKL(weight=1.0)}
    scores = score_positions(student.hidden(batch), student.head, teacher, losses, context=context)
    top1_P, valid_P = scores.top1_ids_P, batch["loss_mask"].cpu().numpy()
    _count(counts, top1_P.cpu().numpy(), teacher.labels_P.cpu().numpy(), valid_P)
    tally.add(
        valid_P,
        (teacher.labels_P >= 0).cpu().numpy(),
        top1_prob_P=scores.top1_prob_P.cpu().numpy(),
        correct_P=(top1_P == teacher.labels_P).cpu().numpy(),
        loss_P=-scores.gold_logprob_P.cpu().numpy(),
        kl=scores.losses["kl"].cpu().numpy(),
        agreement=(top1_P == scores.teacher_top1_P).cpu().numpy(),
    )


def _class_counts(cache: Cache) -> ClassCounts | None:
    """Return where to count classes; None where ids are those of tokens."""
    return ClassCounts(cache.manifest.num_ids) if task_of(cache.manifest.task).gives == "classes" else None


def _count(
    counts: ClassCounts | None,
    predicted_P: NDArray[np.integer],
    labels_P: NDArray[np.int64],
    valid_P: NDArray[np.bool_],
) -> None:
    if counts is not None:
        known_P = valid_P & (labels_P >= 0)
        counts.add(predicted_P[known_P], labels_P[known_P])


def _row(name: str, num_parameters: int | None, tally: Tally, counts: ClassCounts | None, **more: Any) -> ModelRow:
    values: dict[str, Any] = {}
    if tally.num_labelled:
        loss = tally.sums["loss"] / tally.num_labelled
        values = {
            "loss": loss,
            "top1_accuracy": tally.sums["correct"] / tally.num_labelled,
            "ece": tally.calibration.error,
        }
        if counts is None:
            # Beyond exp(700) float64 overflows; a loss like that is no perplexity worth reading anyway.
            values["perplexity"] = math.exp(loss) if loss < 700 else math.inf
        else:
            values["metrics"] = {"macro_f1": macro_f1(counts.correct_C, counts.predicted_C, counts.actual_C)}
    return ModelRow(model=name, num_parameters=num_parameters, **values | more)


def _knows_favourite(cache: Cache) -> bool:
    """Whether the cache holds the teacher's most probable token: samples alone only suggest it."""
    return cache.manifest.top_k > 0
