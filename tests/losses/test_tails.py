from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from kdcache.estimate.rows import Rows, codec_kl
from kdcache.losses import ChunkView, ForwardKL, Objective, ObjectiveConfig, TeacherContext, TeacherRows
from kdcache.losses.tails import TAILS, bucket_kl, completed_kl
from kdcache.models.lm_head import LMHead
from kdcache.schema import Targets
from kdcache.verify.against_teacher import shared_kl
from tests.loops import loop
from tests.losses.oracle import (
    Case,
    dense_logits,
    dense_loss,
    dense_target,
    dense_values,
    forward_kls,
    make_case,
    ragged_case,
)

COMPLETED = ["prior", "uniform"]


def forward_kl(tail: str) -> ForwardKL:
    return ForwardKL(weight=1.0, tail=tail)


def values_and_gradient(loss, logits_PV: Tensor, rows: TeacherRows, context: TeacherContext) -> tuple[Tensor, Tensor]:
    logits_PV = logits_PV.detach().requires_grad_()
    values_P = loss.values(ChunkView(logits_PV, rows, context))
    (gradient_PV,) = torch.autograd.grad(values_P.sum(), logits_PV)
    return values_P.detach(), gradient_PV


def dense_targets(case: Case, tail: str) -> Tensor:
    return torch.stack([dense_target(case, tail, row) for row in range(case.rows.num_positions)])


def test_the_table_is_what_the_setting_offers():
    assert list(get_args(ForwardKL.model_fields["tail"].annotation)) == list(TAILS)
    assert len(TAILS) == 5


@loop("tail", ["prior", "uniform", "renormalise"])
def test_the_gradient_is_the_student_minus_the_target(tail):
    case = make_case(masked=False)
    logits_PV = dense_logits(case).detach()
    _, found_PV = values_and_gradient(forward_kl(tail), logits_PV, case.rows, case.context)
    expected_PV = logits_PV.softmax(1) - dense_targets(case, tail)
    torch.testing.assert_close(found_PV, expected_PV, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_dropped_tail_pulls_by_the_kept_mass_only():
    case = make_case(masked=False)
    logits_PV = dense_logits(case).detach()
    _, found_PV = values_and_gradient(forward_kl("drop"), logits_PV, case.rows, case.context)
    kept_mass_P1 = case.rows.logprobs_PK.exp().sum(1, keepdim=True)
    torch.testing.assert_close(found_PV, kept_mass_P1 * logits_PV.softmax(1) - dense_targets(case, "drop"))


@loop("dtype", [torch.float32, torch.float64])
@loop("tail", COMPLETED)
def test_a_student_equal_to_the_completed_target_has_no_divergence(tail, dtype):
    case = make_case(num_positions=200, masked=False)
    same_PV = (dense_targets(case, tail).log() + 7.0).to(dtype)
    values_P, gradient_PV = values_and_gradient(forward_kl(tail), same_PV, case.rows, case.context)
    rounding = 1e-6 if dtype == torch.float32 else 1e-12
    assert float(values_P.abs().max()) < rounding
    assert float(gradient_PV.abs().max()) < rounding
    # The teacher itself is not that target, and nor is anybody else.
    others = (case.teacher_logits_PV, same_PV.flip(0))
    for other_PV in others:
        assert float(values_and_gradient(forward_kl(tail), other_PV.to(dtype), case.rows, case.context)[0].min()) > 1e-4


def test_a_dropped_tail_is_no_divergence():
    case = make_case(num_positions=200, masked=False)
    sharper_PV = torch.full_like(case.teacher_logits_PV, -20.0).scatter(1, case.rows.ids_PK, case.rows.logprobs_PK)
    assert float(values_and_gradient(forward_kl("drop"), sharper_PV, case.rows, case.context)[0].max()) < 0


@loop("tail", COMPLETED)
def test_without_a_tail_the_completed_target_is_the_bucket(tail):
    case = make_case(top_k=31, masked=False)
    view = ChunkView(dense_logits(case), case.rows, case.context)
    torch.testing.assert_close(completed_kl(view, tail), bucket_kl(view), rtol=0, atol=0)
    case = make_case(top_k=6, masked=False)
    rows = replace(
        case.rows, logprobs_PK=case.rows.logprobs_PK.log_softmax(1), log_tail_P=torch.full((13,), -torch.inf).double()
    )
    view = ChunkView(dense_logits(case), rows, case.context)
    torch.testing.assert_close(completed_kl(view, tail), bucket_kl(view), rtol=1e-12, atol=1e-12)


def test_rows_whose_tail_the_prior_does_not_know_fall_back_on_the_bucket():
    case = make_case(masked=False)
    # All mass of the prior lies on the ids of the first row; a difference of two sums leaves some rounding of it.
    ids_K = case.rows.ids_PK[0]
    random = torch.Generator().manual_seed(1)
    priors = (
        torch.zeros(31, dtype=torch.float64).index_copy(0, ids_K, torch.rand(6, generator=random, dtype=torch.float64))
        for _ in range(100)
    )
    prior_V = next(prior_V for prior_V in priors if prior_V.sum() - prior_V[ids_K].sum() > 0)
    context = replace(case.context, prior_V=prior_V)
    logits_PV = dense_logits(case).detach()
    values_P, gradient_PV = values_and_gradient(forward_kl("prior"), logits_PV, case.rows, context)
    buckets_P, bucket_gradient_PV = values_and_gradient(forward_kl("bucket"), logits_PV, case.rows, context)
    torch.testing.assert_close(values_P[0], buckets_P[0])
    torch.testing.assert_close(gradient_PV[0], bucket_gradient_PV[0])
    assert gradient_PV.isfinite().all()
    assert not torch.isclose(values_P[1:], buckets_P[1:]).any()


@loop("loss", forward_kls(), ids=repr)
@loop("top_k", [6, 31])
def test_a_student_with_more_ids_than_the_teacher_learns_to_give_them_nothing(loss, top_k):
    case = make_case(top_k=top_k)
    random = torch.Generator().manual_seed(2)
    more_VD = torch.randn(36, 5, generator=random, dtype=torch.float64).requires_grad_()
    wide = replace(case, head=LMHead(more_VD))
    objective = Objective(ObjectiveConfig(forward_kl=loss), chunk_positions=4, context=case.context_for(loss))
    found = objective(wide.hidden_PD, wide.head, wide.rows, 7).loss
    # The target is the one of the teacher's vocabulary, followed by zeros.
    if loss.tail in COMPLETED or loss.mode == "full":
        num_extra = 5
        target_PV = dense_targets(case, loss.tail) if loss.tail in COMPLETED else None
        if target_PV is None:
            target_PV = (case.teacher_logits_PV / loss.temperature).softmax(1)
        target_PV = torch.nn.functional.pad(target_PV, (0, num_extra))
        log_p_PV = (dense_logits(wide) / loss.temperature).log_softmax(1)
        terms_PV = torch.special.xlogy(target_PV, target_PV) - target_PV * log_p_PV
        values_P = loss.temperature**2 * terms_PV.sum(1)
        expected = values_P[case.rows.loss_mask_P].sum() / 7
    else:
        expected = dense_loss(wide, ObjectiveConfig(forward_kl=loss), 7)
    leaves = [wide.hidden_PD, more_VD]
    torch.testing.assert_close(found, expected)
    for mine, dense in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, dense)


@loop("spread", COMPLETED)
def test_quantities_may_be_asked_for_in_any_order(spread):
    case = make_case(masked=False)
    asks = {
        "lse": lambda view: view.lse_C,
        "sum": lambda view: view.tail_logit_sum_C(spread),
        "cold": lambda view: view.tempered(0.5)[1],
        "kept": lambda view: view.student_logits_CK,
    }
    found = []
    for order in itertools.permutations(asks):
        logits_PV = dense_logits(case).detach().requires_grad_()
        view = ChunkView(logits_PV, case.rows, case.context)
        values = {name: asks[name](view) for name in order}
        (gradient_PV,) = torch.autograd.grad(sum(value.sum() for value in values.values()), logits_PV)
        found.append([*(values[name] for name in asks), gradient_PV])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_float32_keeps_its_digits_when_the_kept_ids_have_almost_all_of_the_prior():
    case = make_case(num_positions=50, masked=False)
    prior_V = torch.full((31,), 1e-9, dtype=torch.float64).index_fill(0, case.rows.ids_PK[0], 0.1)
    context = replace(case.context, prior_V=prior_V)
    exact, exact_gradient = values_and_gradient(forward_kl("prior"), dense_logits(case), case.rows, context)
    single = replace(context, prior_V=prior_V.float())
    found, gradient = values_and_gradient(forward_kl("prior"), dense_logits(case).float(), case.rows, single)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- ragged rows


RAGGED = torch.tensor([1, 8, 3, 5, 8, 2, 1, 7, 4, 31, 6])


@loop("top_k", [8, 31])
@loop("loss", forward_kls(), ids=repr)
def test_padded_rows_equal_the_same_rows_without_pads(loss, top_k):
    case = ragged_case(RAGGED.clamp(max=top_k), top_k)
    logits_PV = dense_logits(case).detach()
    context = case.context_for(loss)
    values_P, gradient_PV = values_and_gradient(loss, logits_PV, case.rows, context)
    torch.testing.assert_close(values_P, dense_values(case, loss).detach(), rtol=1e-10, atol=1e-10)
    plain = replace(context, is_ragged=False)
    for row, num_kept in enumerate(RAGGED.clamp(max=top_k).tolist()):
        one = case.rows.slice(row, row + 1)
        one = replace(one, ids_PK=one.ids_PK[:, :num_kept], logprobs_PK=one.logprobs_PK[:, :num_kept])
        alone, gradient = values_and_gradient(loss, logits_PV[row : row + 1], one, plain)
        torch.testing.assert_close(values_P[row], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient_PV[row], gradient[0], rtol=1e-12, atol=1e-12)


@loop("loss", forward_kls(), ids=repr)
def test_objective_and_gradients_of_padded_rows_equal_the_dense_ones(loss):
    case = ragged_case(RAGGED.clamp(max=8))
    config = ObjectiveConfig.model_validate({"forward_kl": loss, "cross_entropy": {"weight": 0.5}})
    objective = Objective(config, chunk_positions=4, context=case.context_for(loss))
    found = objective(case.hidden_PD, case.head, case.rows, 11).loss
    expected = dense_loss(case, config, 11)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for mine, dense in zip(
        torch.autograd.grad(found, case.leaves()), torch.autograd.grad(expected, case.leaves()), strict=True
    ):
        torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)


def test_more_pads_change_nothing():
    case = ragged_case(RAGGED.clamp(max=8))
    wider = replace(
        case.rows,
        ids_PK=torch.cat([case.rows.ids_PK, case.rows.ids_PK[:, :1].expand(-1, 40)], 1),
        logprobs_PK=torch.nn.functional.pad(case.rows.logprobs_PK, (0, 40), value=-torch.inf),
    )
    logits_PV = dense_logits(case).detach()
    for loss in forward_kls():
        context = case.context_for(loss)
        torch.testing.assert_close(
            values_and_gradient(loss, logits_PV, wider, context),
            values_and_gradient(loss, logits_PV, case.rows, context),
            rtol=1e-12,
            atol=1e-12,
        )


def test_the_formulas_of_losses_checks_and_estimates_agree():
    """KL over the kept ids and one bucket, in torch for a student, in numpy for two caches."""
    generator = np.random.default_rng(3)
    num_positions, vocab_size, top_k = 20, 30, 6

    def distribution(seed: float) -> np.ndarray:
        logits_PV = generator.normal(scale=seed, size=(num_positions, vocab_size))
        return logits_PV - np.log(np.exp(logits_PV).sum(1, keepdims=True))

    teacher_PV, student_PV = distribution(2.0), distribution(1.0)
    ids_PK = np.argsort(-teacher_PV, axis=1)[:, :top_k]

    def targets(logprobs_PV: np.ndarray) -> Targets:
        kept_PK = np.take_along_axis(logprobs_PV, ids_PK, 1)
        return Targets(ids_PK.astype(np.uint32), kept_PK, np.log1p(-np.exp(kept_PK).sum(1)))

    teacher, student = targets(teacher_PV), targets(student_PV)
    rows = TeacherRows(
        *(torch.from_numpy(a) for a in (ids_PK, teacher.logprobs_PK, teacher.log_tail_P)),
        None,
        torch.zeros(num_positions, dtype=torch.int64),
        torch.ones(num_positions, dtype=torch.bool),
    )
    expected_P = bucket_kl(ChunkView(torch.from_numpy(student_PV), rows)).numpy()
    np.testing.assert_allclose(shared_kl(teacher, student), expected_P, rtol=1e-9)
    exact, decoded = (Rows.of(t.ids_PK, t.logprobs_PK, t.log_tail_P, vocab_size) for t in (teacher, student))
    np.testing.assert_allclose(codec_kl(exact, decoded), expected_P.mean(), rtol=1e-9)
