from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdcache.losses import ChunkView, Loss
from kdcache.losses.divergences import LogitsMSE, Ranking
from kdcache.models.lm_head import LMHead
from tests.loops import loop
from tests.losses.oracle import Case, dense_logits, make_case, ragged_case, with_teacher_head

LOSSES = [LogitsMSE(weight=1.0), Ranking(weight=1.0), Ranking(weight=1.0, top_k=5)]


def values_and_gradient(loss: Loss, case: Case, logits_PV: Tensor) -> tuple[Tensor, Tensor]:
    logits_PV = logits_PV.detach().requires_grad_()
    values_P = loss.values(ChunkView(logits_PV, case.rows, case.context))
    (gradient_PV,) = torch.autograd.grad(values_P.sum(), logits_PV)
    return values_P.detach(), gradient_PV


def without_head(case: Case) -> Case:
    return replace(case, context=replace(case.context, head=None))


@loop("loss", LOSSES, ids=repr)
def test_a_cache_of_hidden_targets_is_one_that_keeps_the_whole_vocabulary(loss):
    hidden = with_teacher_head(make_case(top_k=1, masked=False))
    kept = without_head(with_teacher_head(make_case(top_k=31, masked=False)))
    logits_PV = dense_logits(hidden)
    found, expected = (values_and_gradient(loss, case, logits_PV) for case in (hidden, kept))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert bool((found[0] > 0).all())


@loop("loss", LOSSES, ids=repr)
def test_further_ids_of_the_student_are_not_compared(loss):
    case = with_teacher_head(make_case(top_k=1, masked=False))
    logits_PV = dense_logits(case)
    wide_PV = torch.cat([logits_PV, 50.0 + torch.zeros(13, 5).double()], 1)
    values_P, gradient_PV = values_and_gradient(loss, case, wide_PV)
    torch.testing.assert_close(values_P, values_and_gradient(loss, case, logits_PV)[0])
    assert float(gradient_PV[:, 31:].abs().max()) == 0


@loop("loss", LOSSES, ids=repr)
def test_ids_that_the_teacher_rules_out_are_not_compared(loss):
    case = make_case(masked=False)
    ruled_out = torch.tensor([3, 17, 30])
    bias_V = torch.zeros(31, dtype=torch.float64).index_fill(0, ruled_out, -torch.inf)
    left = torch.ones(31, dtype=torch.bool).index_fill(0, ruled_out, False)
    identity_VV = torch.eye(31, dtype=torch.float64)
    some = replace(case, context=replace(case.context, vocab_size=31, head=LMHead(identity_VV, bias_V)))
    fewer = replace(case, context=replace(case.context, vocab_size=None, prior_V=None, head=LMHead(identity_VV[left])))
    logits_PV = dense_logits(case)
    values_P, gradient_PV = values_and_gradient(loss, some, logits_PV)
    expected_P, expected_PV = values_and_gradient(loss, fewer, logits_PV[:, left])
    torch.testing.assert_close(values_P, expected_P)
    torch.testing.assert_close(gradient_PV[:, left], expected_PV)
    assert float(gradient_PV[:, ruled_out].abs().max()) == 0


@loop("dtype", [torch.float32, torch.float64])
def test_the_teachers_logits_up_to_a_constant_have_no_squared_difference(dtype):
    for case in (make_case(), ragged_case(torch.tensor([1, 5, 8])), with_teacher_head(make_case())):
        logits_PV = (case.teacher_logits_PV + 40.0).to(dtype)
        values_P, gradient_PV = values_and_gradient(LogitsMSE(weight=1.0), case, logits_PV)
        rounding = 1e-4 if dtype == torch.float32 else 1e-12
        assert float(gradient_PV.abs().max()) < rounding
        assert float(values_P.max()) < rounding**2
        assert float(values_and_gradient(LogitsMSE(weight=1.0), case, -logits_PV)[0].mean()) > 1


def test_rows_of_one_id_have_nothing_to_compare():
    case = ragged_case(torch.tensor([1, 1, 3]))
    for loss in LOSSES:
        values_P, gradient_PV = values_and_gradient(loss, case, dense_logits(case))
        assert values_P[:2].tolist() == [0, 0]
        assert float(values_P[2]) > 0
        assert float(gradient_PV[:2].abs().max()) == 0


def test_ranking_is_small_in_the_teachers_order_and_large_against_it():
    case = make_case(masked=False)
    clear_PV = 10.0 * torch.arange(31.0, dtype=torch.float64)
    order_PV = case.teacher_logits_PV.argsort(1).argsort(1)
    right_P = values_and_gradient(Ranking(weight=1.0), case, clear_PV[order_PV])[0]
    wrong_P = values_and_gradient(Ranking(weight=1.0), case, -clear_PV[order_PV])[0]
    assert float(right_P.max()) < 1e-3
    # Every place but the last loses to the last of the six: by 50, 40, ..., 10 nats.
    torch.testing.assert_close(wrong_P, torch.full((13,), 30.0).double(), rtol=1e-3, atol=1e-3)


def test_ranking_learns_the_order_that_a_cross_entropy_of_the_first_id_does_not():
    case = make_case(num_positions=4, top_k=6, masked=False)
    logits_PV = dense_logits(case).detach()
    for _ in range(300):
        logits_PV = logits_PV - 2.0 * values_and_gradient(Ranking(weight=1.0), case, logits_PV)[1]
    learnt_PK = logits_PV.gather(1, case.rows.ids_PK)
    assert bool((learnt_PK.diff(dim=1) < 0).all())
