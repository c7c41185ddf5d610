"""Rows of samples: their expectation over seeds is the full divergence, and a truncation of them is not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.losses import (
    ChunkView,
    CrossEntropy,
    ForwardKL,
    Objective,
    ObjectiveConfig,
    TeacherContext,
    TeacherRows,
    score_positions,
)
from kdcache.models.lm_head import LMHead
from kdcache.schema import Samples, Targets
from tests.loops import loop

NUM_SEEDS, NUM_SAMPLES, VOCAB_SIZE, TOP_K = 1000, 20, 31, 4
FORWARD_KL = ForwardKL(weight=1.0)


@dataclass(frozen=True)
class Trial:
    """Gradients [seeds, P, V] and values [seeds, P] of rows that were drawn anew for every seed, and the exact ones."""

    gradients: Tensor
    values: Tensor
    full_gradient_PV: Tensor
    full_value_P: Tensor

    @property
    def surplus(self) -> float:
        """Squared distance of the mean gradient from the full one over what chance explains (1 if unbiased)."""
        distance = (self.gradients.mean(0) - self.full_gradient_PV).square().sum()
        return float(distance / (self.gradients.var(0) / NUM_SEEDS).sum())

    @property
    def value_errors(self) -> Tensor:
        """Distance of the mean value from the full one in standard errors, [P]."""
        return (self.values.mean(0) - self.full_value_P) / (self.values.std(0) / NUM_SEEDS**0.5)


def draw(teacher_PV: Tensor, kind: str, most_frequent: int | None = None) -> Targets:
    """Targets of every position as a dump makes them, for many seeds: [seeds * P] rows, without truncation."""
    random = np.random.default_rng(5)
    probs_RV = teacher_PV.numpy()[None].repeat(NUM_SEEDS, 0).reshape(-1, VOCAB_SIZE)
    order_RV = (-probs_RV).argsort(1)
    ids_RK = order_RV[:, : TOP_K if kind == "hybrid" else 0].astype(np.int32)
    outside_RV = probs_RV.copy()
    np.put_along_axis(outside_RV, ids_RK.astype(np.int64), 0, 1)
    tail_R = outside_RV.sum(1)
    counts_RV = random.multinomial(NUM_SAMPLES, outside_RV / tail_R[:, None])
    by_count_RV = (-counts_RV).argsort(1, kind="stable")
    width = int((counts_RV > 0).sum(1).max())
    counts_RJ = np.take_along_axis(counts_RV, by_count_RV, 1)[:, :width]
    if most_frequent is not None:
        counts_RJ[:, most_frequent:] = 0
    entropy_R = -(probs_RV * np.log(probs_RV)).sum(1)
    return Targets(
        ids_RK,
        np.log(np.take_along_axis(probs_RV, ids_RK.astype(np.int64), 1)).astype(np.float32),
        np.log(tail_R).astype(np.float32),
        np.zeros(len(tail_R), np.float32),
        entropy_R.astype(np.float32),
        samples=Samples(by_count_RV[:, :width].astype(np.int32), counts_RJ),
    )


def rows_of(targets: Targets) -> TeacherRows:
    ids, logprobs, log_tail = targets.merged()
    labels_P = torch.zeros(len(ids), dtype=torch.int64)
    return TeacherRows(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(logprobs),
        torch.from_numpy(log_tail),
        torch.from_numpy(targets.entropy_P),
        labels_P,
        torch.ones_like(labels_P, dtype=torch.bool),
    )


def models() -> tuple[Tensor, Tensor]:
    """Teacher probabilities and student logits of 6 positions, unlike each other."""
    random = torch.Generator().manual_seed(3)
    teacher_PV, student_PV = torch.randn(2, 6, VOCAB_SIZE, generator=random, dtype=torch.float64)
    return (1.5 * teacher_PV).softmax(1), 1.5 * student_PV


def trial(kind: str, most_frequent: int | None = None) -> Trial:
    teacher_PV, student_PV = models()
    rows = rows_of(draw(teacher_PV, kind, most_frequent))
    context = TeacherContext(kind, VOCAB_SIZE)
    hidden = student_PV.repeat(NUM_SEEDS, 1).requires_grad_()
    head = LMHead(torch.eye(VOCAB_SIZE, dtype=torch.float64))
    loss = Objective(ObjectiveConfig(forward_kl=FORWARD_KL), context=context)(hidden, head, rows, 1).loss
    (gradients,) = torch.autograd.grad(loss, hidden)
    values = score_positions(hidden, head, rows, {"kl": FORWARD_KL}, context=context).losses["kl"]
    shape = (NUM_SEEDS, *student_PV.shape)
    log_p_PV = student_PV.log_softmax(1)
    full_value_P = (teacher_PV * (teacher_PV.log() - log_p_PV)).sum(1)
    return Trial(gradients.reshape(shape), values.reshape(shape[:2]), log_p_PV.exp() - teacher_PV, full_value_P)


@loop("kind", ["sampled", "hybrid"])
def test_the_mean_over_seeds_is_the_full_gradient_and_the_full_value(kind):
    found = trial(kind)
    # A ratio of sums over more than 100 nearly independent terms: 1 with a standard deviation of about 0.15.
    assert 0.4 < found.surplus < 1.6
    assert float(found.value_errors.abs().max()) < 4


@loop("kind", ["sampled", "hybrid"])
def test_keeping_only_the_most_frequent_draws_would_not_pass(kind):
    assert trial(kind, most_frequent=3).surplus > 16


def test_exact_heads_make_the_estimate_better():
    sampled, hybrid = trial("sampled"), trial("hybrid")
    assert float(hybrid.gradients.var(0).sum()) < 0.5 * float(sampled.gradients.var(0).sum())


@loop("kind", ["sampled", "hybrid"])
def test_each_gradient_is_the_student_minus_the_frequencies(kind):
    teacher_PV, student_PV = models()
    rows = rows_of(draw(teacher_PV, kind)).slice(0, 6)
    assert bool(rows.logprobs_PK.isneginf().any()), "there are pads, which repeat an id"
    logits_PV = student_PV.requires_grad_()
    values_P = FORWARD_KL.values(ChunkView(logits_PV, rows, TeacherContext(kind, VOCAB_SIZE)))
    (found_PV,) = torch.autograd.grad(values_P.sum(), logits_PV)
    target_PV = torch.zeros_like(student_PV).scatter_add(1, rows.ids_PK, rows.logprobs_PK.double().exp())
    torch.testing.assert_close(target_PV.sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found_PV, student_PV.softmax(1) - target_PV, rtol=1e-5, atol=1e-6)
    cross_P = -(target_PV * student_PV.log_softmax(1)).sum(1)
    torch.testing.assert_close(values_P, cross_P - rows.entropy_P.double(), rtol=1e-6, atol=1e-6)


def test_rows_without_a_tail_and_draws_are_exact():
    # A hybrid row whose kept ids have all the mass: nothing was drawn, and its places for samples are pads.
    rows = TeacherRows(
        torch.tensor([[2, 0, 2, 2]]),
        torch.tensor([[0.75, 0.25, 0.0, 0.0]]).log(),
        torch.tensor([-torch.inf]),
        -(0.75 * torch.tensor([0.75]).log() + 0.25 * torch.tensor([0.25]).log()),
        torch.tensor([1]),
        torch.tensor([True]),
    )
    logits = torch.tensor([[-20.0, -60.0, -20.0 + np.log(3.0), -60.0]], requires_grad=True)
    value = FORWARD_KL.values(ChunkView(logits, rows, TeacherContext("hybrid", 4)))
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert float(gradient.abs().max()) < 1e-6


def test_a_tail_that_nothing_was_drawn_from_stays_a_bucket():
    rows = TeacherRows(
        torch.tensor([[2, 0, 2]]),
        torch.tensor([[0.5, 0.2, 0.0]]).log(),
        torch.tensor([0.3]).log(),
        torch.tensor([1.25]),
        torch.tensor([1]),
        torch.tensor([True]),
    )
    student = torch.tensor([[0.1, 0.3, 0.4, 0.2]])
    value = FORWARD_KL.values(ChunkView(student.log(), rows, TeacherContext("hybrid", 4)))
    expected = -(0.5 * np.log(0.4) + 0.2 * np.log(0.1) + 0.3 * np.log(0.5)) - 1.25
    assert float(value) == pytest.approx(expected, rel=1e-6)


@loop("kind", ["sampled", "hybrid"])
def test_objective_with_a_cross_entropy_and_masked_rows(kind):
    teacher_PV, student_PV = models()
    rows = rows_of(draw(teacher_PV, kind)).slice(0, 6)
    rows = replace(rows, loss_mask_P=torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool))
    config = ObjectiveConfig(forward_kl=FORWARD_KL, cross_entropy=CrossEntropy(weight=0.5))
    head = LMHead(torch.eye(VOCAB_SIZE, dtype=torch.float64))
    hidden_PD = student_PV.requires_grad_()
    context = TeacherContext(kind, VOCAB_SIZE)
    found = [Objective(config, chunk_positions=n, context=context)(hidden_PD, head, rows, 4).loss for n in (1, 3, 9)]
    target_PV = torch.zeros_like(student_PV).scatter_add(1, rows.ids_PK, rows.logprobs_PK.double().exp())
    log_p_PV = hidden_PD.log_softmax(1)
    values_P = -(target_PV * log_p_PV).sum(1) - rows.entropy_P - 0.5 * log_p_PV[:, 0]
    expected = values_P[rows.loss_mask_P].sum() / 4
    (gradient,) = torch.autograd.grad(expected, hidden_PD)
    for loss in found:
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden_PD)[0], gradient, rtol=1e-5, atol=1e-6)
    nothing = replace(rows, loss_mask_P=torch.zeros(6, dtype=torch.bool))
    assert float(Objective(config, context=context)(hidden_PD, head, nothing, 0).loss.detach()) == 0
