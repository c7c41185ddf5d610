"""Evaluating models that predict distributions, over tokens or classes.

Only positions whose loss mask is 1 count; accuracy, loss and calibration are over those of them that have a label. KL
is the forward KL at temperature 1: exact when the cache is of the kind hidden or keeps the whole vocabulary (or all
classes); otherwise that of the kept ids and one bucket for the tail, a lower bound; an unbiased estimate where the
cache holds samples. A cache of samples alone does not know the teacher's top-1 token, so what needs it is left out.

For classes macro F1 is added, from counts that are summed over batches; perplexity and the kept mass, which is always
1, are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from kdcache.cache import Cache
from kdcache.evaluate.measures import Answers, Metrics
from kdcache.evaluate.metrics import macro_f1
from kdcache.evaluate.table_rows import ModelRow
from kdcache.evaluate.tally import ClassCounts, Tally
from kdcache.losses import ForwardKL, incompatibility, score_positions
from kdcache.losses.from_cache import context_of
from kdcache.schema import NO_LABEL, OUTPUTS_FIELD, SequenceBatch
from kdcache.step import StepInputs
from kdcache.students import Student
from kdcache.tasks import Task, task_of
from kdcache.torch_data import count_tokens, to_tensors


class Distributions:
    """Evaluate the models of a cache whose task predicts tokens or classes; students one at a time."""

    def __init__(self, cache: Cache, batches: Sequence[list[int]], device: torch.device, progress: bool) -> None:
        self._cache, self._batches, self._device, self._progress = cache, batches, device, progress
        self._task = task_of(cache.manifest.task)
        self._context = context_of(cache).to(device)
        self._own: Answers | None = None

    def teacher(self) -> tuple[ModelRow, int]:
        """Return the teacher's row, from the cache alone, and the number of positions that count."""
        tally, counts = Tally(), _class_counts(self._cache)
        answers: list[Answers] | None = [] if self._has_metrics else None
        for indices in tqdm(self._batches, desc="teacher", unit="batch", disable=not self._progress):
            batch = self._cache.read(indices, hidden=() if answers is None else (OUTPUTS_FIELD,))
            if answers is not None:
                answers.append(self._answers(batch, batch.hidden[OUTPUTS_FIELD]))
            targets = batch.targets
            labels_P = self._task.labels(batch.sequences())
            valid_P = batch.loss_mask_P.astype(bool)
            _count(counts, targets.top1_ids_P, labels_P, valid_P)
            values_P = {} if targets.entropy_P is None else {"entropy": targets.entropy_P}
            tally.add(
                valid_P,
                labels_P >= 0,
                top1_prob_P=np.exp(targets.logprobs_PK[:, 0]) if targets.top_k else np.zeros(len(labels_P), np.float32),
                correct_P=targets.top1_ids_P == labels_P,
                loss_P=None if targets.gold_logprob_P is None else -targets.gold_logprob_P,
                kept_mass=-np.expm1(targets.log_tail_P),
                **values_P,
            )
        more: dict[str, Any] = {"entropy": tally.mean("entropy") if "entropy" in tally.sums else None}
        knows_mass = self._context.has("vocabulary_probabilities")
        if counts is None and knows_mass:
            more["kept_mass"] = tally.mean("kept_mass")
        if not _has_top1(self._cache):
            more |= {"top1_accuracy": None, "ece": None}
        elif not knows_mass:
            more["ece"] = None
        record = self._cache.manifest.teacher
        row = _row(f"{record.name} (teacher)", record.num_parameters, tally, counts, **more)
        if answers is not None:
            self._own = Answers.joined(answers)
            row = _with_metrics(row, self._task.metrics(self._own, None))
        return row, tally.num_positions

    def student(self, name: str, student: Student) -> ModelRow:
        """Return the row of ``student``, which is on the device of the evaluation."""
        tally, counts, seconds, num_tokens = Tally(), _class_counts(self._cache), 0.0, 0
        answers = []
        for indices in tqdm(self._batches, desc=name, unit="batch", disable=not self._progress):
            read = self._cache.read(indices)
            tensors = to_tensors(read, student.pad_id, self._task)
            batch = {key: value.to(self._device) for key, value in tensors.items()}
            started_s = time.perf_counter()
            self._add(tally, counts, student, batch)
            seconds += time.perf_counter() - started_s
            num_tokens += int(count_tokens(batch))
            if self._has_metrics:
                answers.append(self._answers(read, _logits(student, batch)))
        row = _row(
            name,
            student.num_parameters,
            tally,
            counts,
            kl=tally.mean("kl") if "kl" in tally.sums else None,
            agreement=tally.mean("agreement") if _has_top1(self._cache) else None,
            tokens_per_s=num_tokens / max(seconds, 1e-9),
        )
        return _with_metrics(row, self._task.metrics(Answers.joined(answers), self._own)) if answers else row

    @property
    def _has_metrics(self) -> bool:
        """Whether the task, about classes, has metrics of its own, for which all answers are kept."""
        return self._task.gives == "classes" and type(self._task).metrics is not Task.metrics

    def _answers(self, batch: SequenceBatch, logits_PC: NDArray[np.float32]) -> Answers:
        """Return a model's logits of classes at the positions that count, with labels as numbers (NaN: none)."""
        groups_P = np.repeat(batch.indices, np.diff(batch.position_offsets_N1))
        labels_P, valid_P = self._task.labels(batch.sequences()), batch.loss_mask_P.astype(bool)
        numbers_P = np.where(labels_P == NO_LABEL, np.nan, labels_P).astype(np.float32)
        return Answers(logits_PC[valid_P], numbers_P[valid_P], groups_P[valid_P])

    @torch.no_grad()
    def _add(self, tally: Tally, counts: ClassCounts | None, student: Student, batch: dict[str, torch.Tensor]) -> None:
        inputs = StepInputs.of(student, batch)
        kl = ForwardKL(weight=1.0)
        losses = {} if incompatibility(kl, self._context) else {"kl": kl}
        scores = score_positions(inputs.hidden_PD, student.head, inputs.rows, losses, context=self._context)
        top1_P, labels_P, valid_P = scores.top1_ids_P, inputs.rows.labels_P, batch["loss_mask"].cpu().numpy()
        _count(counts, top1_P.cpu().numpy(), labels_P.cpu().numpy(), valid_P)
        tally.add(
            valid_P,
            (labels_P >= 0).cpu().numpy(),
            top1_prob_P=scores.top1_prob_P.cpu().numpy(),
            correct_P=(top1_P == labels_P).cpu().numpy(),
            loss_P=-scores.gold_logprob_P.cpu().numpy(),
            **{name: values_P.cpu().numpy() for name, values_P in scores.losses.items()},
            agreement=(top1_P == scores.teacher_top1_P).cpu().numpy(),
        )


@torch.no_grad()
def _logits(student: Student, batch: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = student.head.logits(student.hidden(batch)).float().cpu().numpy()
    return logits


def _with_metrics(row: ModelRow, metrics: Metrics) -> ModelRow:
    return row.model_copy(update={"metrics": row.metrics | metrics})


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
        values = {
            "top1_accuracy": tally.sums["correct"] / tally.num_labelled,
            "ece": tally.calibration.error,
        }
        if "loss" in tally.sums:
            loss = values["loss"] = tally.sums["loss"] / tally.num_labelled
            # Beyond exp(700) float64 overflows; a loss like that is no perplexity worth reading anyway.
            perplexity = math.exp(loss) if loss < 700 else math.inf
            values |= {"perplexity": perplexity} if counts is None else {}
        if counts is not None:
            values["metrics"] = {"macro_f1": macro_f1(counts.correct_C, counts.predicted_C, counts.actual_C)}
    return ModelRow(model=name, num_parameters=num_parameters, **values | more)


def _has_top1(cache: Cache) -> bool:
    """Whether the cache holds the teacher's most probable token: samples alone only suggest it."""
    return cache.manifest.top_k > 0
