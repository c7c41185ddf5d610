"""Evaluating models that predict distributions, over tokens or classes.

Only positions whose loss mask is 1 count; accuracy, loss and calibration are over those of them that have a label. KL
is the forward KL at temperature 1: exact when the cache is of the kind hidden or keeps the whole vocabulary (or all
classes); otherwise that of the kept ids and one bucket for the tail, a lower bound; an unbiased estimate where the
cache holds samples. A cache of samples alone does not know the teacher's top-1 token, so what needs it is left out.

Sums are added up, not means, so that batches of any size add up exactly; in float64, because a million float32 addends
would not. The expected calibration error is that of Guo et al. (2017, "On Calibration of Modern Neural Networks",
section 2): top-1 confidences in 15 bins of equal width, mean over bins of |accuracy - confidence|, weighted by the
bin's share.

For classes macro F1 is added, from counts that are summed over batches; perplexity and the kept mass, which is always
1, are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from kdcache.cache import Cache
from kdcache.evaluate.measures import Answers, Metrics
from kdcache.evaluate.metrics import macro_f1
from kdcache.evaluate.results import ModelRow
from kdcache.losses import ForwardKL, incompatibility, score_positions
from kdcache.losses.from_cache import context_of
from kdcache.schema import NO_LABEL, OUTPUTS_FIELD, SequenceBatch
from kdcache.step import StepInputs
from kdcache.students import Student
from kdcache.tasks import Task, task_of
from kdcache.torch_data import count_tokens, to_tensors

#: Bins of the calibration error.
NUM_BINS = 15


@dataclass
class Calibration:
    """Counts, confidences and hits per confidence bin; bin i holds confidences in (i / 15, (i + 1) / 15]."""

    count: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))
    confidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))
    correct: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_BINS))

    def add(self, confidence_P: NDArray[np.floating], correct_P: NDArray[np.bool_]) -> None:
        """Add P predictions: the probability of the top-1 id, and whether it is the label."""
        bins = np.clip(np.ceil(confidence_P.astype(np.float64) * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
        self.count += np.bincount(bins, minlength=NUM_BINS)
        self.confidence += np.bincount(bins, weights=confidence_P, minlength=NUM_BINS)
        self.correct += np.bincount(bins, weights=correct_P, minlength=NUM_BINS)

    @property
    def error(self) -> float:
        """Expected calibration error, between 0 and 1."""
        return float(np.abs(self.correct - self.confidence).sum() / max(self.count.sum(), 1))


@dataclass
class ClassCounts:
    """Counts for F1: correct predictions, predictions, and labels of each of C classes."""

    num_classes: int
    correct_C: NDArray[np.int64] = field(init=False)
    predicted_C: NDArray[np.int64] = field(init=False)
    actual_C: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.correct_C, self.predicted_C, self.actual_C = (np.zeros(self.num_classes, np.int64) for _ in range(3))

    def add(self, predicted_P: NDArray[np.integer], actual_P: NDArray[np.integer]) -> None:
        """Add the predicted and the actual classes of P positions."""
        pairs = (
            (self.correct_C, actual_P[predicted_P == actual_P]),
            (self.predicted_C, predicted_P),
            (self.actual_C, actual_P),
        )
        for counts_C, classes_P in pairs:
            counts_C += np.bincount(classes_P, minlength=self.num_classes)


@dataclass
class Tally:
    """Sums over the valid positions of one model's predictions, compared with labels and teacher."""

    calibration: Calibration = field(default_factory=Calibration)
    num_positions: int = 0
    num_labelled: int = 0
    """Valid positions with a label: loss, accuracy and calibration are over these."""
    sums: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        valid_P: NDArray[np.bool_],
        is_labelled_P: NDArray[np.bool_],
        *,
        top1_prob_P: NDArray[np.floating],
        correct_P: NDArray[np.bool_],
        loss_P: NDArray[np.floating] | None,
        **values_P: NDArray[np.generic],
    ) -> None:
        """Add the valid positions of a batch; ``values_P`` are further values to average over them."""
        known_P = valid_P & is_labelled_P
        self.num_positions += int(valid_P.sum())
        self.num_labelled += int(known_P.sum())
        self.calibration.add(top1_prob_P[known_P], correct_P[known_P])
        self._add({"correct": correct_P} if loss_P is None else {"loss": loss_P, "correct": correct_P}, known_P)
        self._add(values_P, valid_P)

    def _add(self, values_P: Mapping[str, NDArray[np.generic]], where_P: NDArray[np.bool_]) -> None:
        for name, value_P in values_P.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value_P[where_P].sum(dtype=np.float64))

    def mean(self, name: str) -> float:
        """Return the mean per valid position of the values called ``name``."""
        return self.sums.get(name, 0.0) / max(self.num_positions, 1)


class DistributionScorer:
    """Evaluate the models of a cache whose task predicts tokens or classes; students one at a time."""

    def __init__(self, cache: Cache, batches: Sequence[list[int]], device: torch.device, progress: bool) -> None:
        self._cache, self._batches, self._device, self._progress = cache, batches, device, progress
        self._task = task_of(cache.manifest.task)
        self._context = context_of(cache).to(device)
        self._own: Answers | None = None

    def teacher(self) -> tuple[ModelRow, int]:
        """Return the teacher's row, from the cache alone, and the number of valid positions."""
        tally, counts = Tally(), _class_counts(self._cache)
        answers: list[Answers] | None = [] if self._has_metrics else None
        for indices in tqdm(self._batches, desc="teacher", unit="batch", disable=not self._progress):
            batch = self._cache.read(indices, fields=() if answers is None else (OUTPUTS_FIELD,))
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
            hidden_PD = self._add(tally, counts, student, batch)
            seconds += time.perf_counter() - started_s
            num_tokens += int(count_tokens(batch))
            if self._has_metrics:
                answers.append(self._answers(read, _logits(student, hidden_PD)))
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
        """Return a model's logits of classes at the valid positions, with labels as numbers (NaN: none)."""
        groups_P = np.repeat(batch.indices, np.diff(batch.position_offsets_N1))
        labels_P, valid_P = self._task.labels(batch.sequences()), batch.loss_mask_P.astype(bool)
        numbers_P = np.where(labels_P == NO_LABEL, np.nan, labels_P).astype(np.float32)
        return Answers(logits_PC[valid_P], numbers_P[valid_P], groups_P[valid_P])

    @torch.no_grad()
    def _add(
        self, tally: Tally, counts: ClassCounts | None, student: Student, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Add a batch to the sums, and return the student's hidden states [P, D]."""
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
        return inputs.hidden_PD


@torch.no_grad()
def _logits(student: Student, hidden_PD: torch.Tensor) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = student.head.logits(hidden_PD).float().cpu().numpy()
    return logits


def _with_metrics(row: ModelRow, metrics: Metrics) -> ModelRow:
    return row.model_copy(update={"metrics": row.metrics | metrics})


def _class_counts(cache: Cache) -> ClassCounts | None:
    """Return empty counts of classes; None for tasks of tokens."""
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
    """Whether the cache holds the teacher's top-1 token; samples alone do not."""
    return cache.manifest.top_k > 0
