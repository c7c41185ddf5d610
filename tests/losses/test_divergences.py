from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcache.losses import LOSSES, ChunkView, CrossEntropy, ForwardKL, TeacherContext, TeacherRows
from kdcache.losses.divergences import LogitsMSE, Ranking
from kdcache.losses.tails import bucket_kl
from kdcache.losses.temperature import decoupled_kl
from tests.loops import loop
from tests.losses.oracle import dense_logits, dense_values, every_loss, make_case, teacher_rows

FORWARD_KL = ForwardKL(weight=1.0)


def values_of(loss, logits_PV: Tensor, rows: TeacherRows, context: TeacherContext | None = None) -> Tensor:
    return loss.values(ChunkView(logits_PV, rows, context or TeacherContext()))


def full_kl(teacher_logits_PV: Tensor, student_logits_PV: Tensor) -> Tensor:
    t, p = teacher_logits_PV.softmax(1), student_logits_PV.softmax(1)
    return (t * (t / p).log()).sum(1)


@loop("loss", every_loss(), ids=repr)
@loop("top_k", [1, 6, 30, 31])
def test_values_equal_the_dense_formula(loss, top_k):
    case = make_case(top_k=top_k)
    found = values_of(loss, dense_logits(case), case.rows, case.context_for(loss))
    torch.testing.assert_close(found, dense_values(case, loss), rtol=1e-10, atol=1e-10)


@loop("temperature", [1.0, 3.0])
def test_the_whole_vocabulary_gives_the_full_divergence(temperature):
    case = make_case(top_k=31)
    student_PV = dense_logits(case)
    found = values_of(ForwardKL(weight=1.0, temperature=temperature), student_PV, case.rows)
    expected = temperature**2 * full_kl(case.teacher_logits_PV / temperature, student_PV / temperature)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_decoupled_at_temperature_one_is_the_bucket():
    case = make_case()
    view = ChunkView(dense_logits(case), case.rows)
    torch.testing.assert_close(decoupled_kl(view, 1.0), bucket_kl(view), rtol=1e-12, atol=1e-12)


def test_bucket_is_below_the_full_divergence_and_grows_with_k():
    case = make_case(num_positions=200)
    student_PV = dense_logits(case).detach()
    by_k = [
        values_of(FORWARD_KL, student_PV, teacher_rows(case.teacher_logits_PV, top_k, case.rows.labels_P))
        for top_k in range(1, 32)
    ]
    assert torch.all(torch.stack(by_k).diff(dim=0) >= -1e-12)
    torch.testing.assert_close(by_k[-1], full_kl(case.teacher_logits_PV, student_PV), rtol=1e-10, atol=1e-10)
    assert float((by_k[-1] - by_k[5]).mean()) > 0.01


@loop("dtype", [torch.float32, torch.float64])
@loop("top_k", [1, 6, 31])
def test_a_student_equal_to_its_teacher_has_no_divergence(top_k, dtype):
    # The other tails are 0 at a completed target (see test_tails) or at no student at all.
    divergences = [
        loss for loss in every_loss() if type(loss).is_divergence and getattr(loss, "tail", "") in ("", "bucket")
    ]
    assert {type(loss) for loss in divergences} == set(LOSSES.values()) - {CrossEntropy, LogitsMSE, Ranking}
    case = make_case(num_positions=200, top_k=top_k, masked=False)
    rows = replace(case.rows, logprobs_PK=case.rows.logprobs_PK.float(), log_tail_P=case.rows.log_tail_P.float())
    shifted_PV = (case.teacher_logits_PV + 7.0).to(dtype)  # logits are free up to a constant
    for loss in divergences:
        # Log-probabilities at T are rounded to eps |logits| / T and weighed with T^2.
        rounding = 1e-6 * max(1.0, loss.temperature**2)
        same = values_of(loss, shifted_PV, rows, case.context_for(loss))
        assert float(same.abs().max()) < (rounding if dtype == torch.float32 else 1e-6)
        assert float(values_of(loss, shifted_PV.flip(0), rows, case.context_for(loss)).min()) > 1e-6


def test_gradients_keep_their_scale_as_the_temperature_grows():
    # Large T: T^2 KL tends to a squared difference of centred logits / (2K), whatever T is.
    case = make_case(top_k=31)
    norms = []
    for temperature in (50.0, 500.0):
        logits_PV = dense_logits(case).detach().requires_grad_()
        values_of(ForwardKL(weight=1.0, temperature=temperature), logits_PV, case.rows).sum().backward()
        norms.append(float(logits_PV.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@loop("loss", every_loss(), ids=repr)
def test_an_empty_teacher_tail_contributes_nothing(loss):
    case = make_case(top_k=6)
    kept_PK = case.rows.logprobs_PK.log_softmax(1)
    rows = replace(case.rows, logprobs_PK=kept_PK, log_tail_P=torch.full_like(case.rows.log_tail_P, -torch.inf))
    case = replace(case, rows=rows)
    logits_PV = dense_logits(case).detach().requires_grad_()
    found = values_of(loss, logits_PV, rows, case.context_for(loss))
    torch.testing.assert_close(found, dense_values(case, loss), rtol=1e-10, atol=1e-10)
    found.sum().backward()
    assert torch.isfinite(logits_PV.grad).all()


@loop("nothing", [-torch.inf, -1e4])
@loop("loss", every_loss(), ids=repr)
def test_ids_without_probability_contribute_exactly_nothing(loss, nothing):
    case = make_case(top_k=6, masked=False)
    padded = case.rows.logprobs_PK.clone()
    padded[:, 4:] = nothing
    mass_left = case.rows.logprobs_PK[:, 4:].logsumexp(1)
    rows = replace(case.rows, logprobs_PK=padded, log_tail_P=torch.logaddexp(case.rows.log_tail_P, mass_left))
    logits_PV = dense_logits(case).detach().requires_grad_()
    found = values_of(loss, logits_PV, rows, case.context_for(loss))
    torch.testing.assert_close(found, dense_values(replace(case, rows=rows), loss), rtol=1e-10, atol=1e-10)
    found.sum().backward()
    assert torch.isfinite(logits_PV.grad).all()


# In mode full such a teacher needs logits of -inf: see test_tempered.
@loop("loss", [loss for loss in every_loss() if getattr(loss, "mode", None) != "full"], ids=repr)
def test_ids_that_the_student_rules_out_are_harmless_where_the_teacher_does_too(loss):
    # A student with fewer real ids than rows has -inf logits there, and no mass outside the teacher's ids is left.
    case = make_case(top_k=6, masked=False)
    logits_PV = torch.full_like(dense_logits(case), -torch.inf).scatter(
        1, case.rows.ids_PK, case.rows.logprobs_PK.flip(1)
    )
    labels_P = case.rows.ids_PK[:, 0]
    kept_PK = case.rows.logprobs_PK.log_softmax(1)
    no_tail_P = torch.full_like(case.rows.log_tail_P, -torch.inf)
    rows = replace(case.rows, logprobs_PK=kept_PK, log_tail_P=no_tail_P, labels_P=labels_P)
    rows = replace(rows, log_tails_PG=no_tail_P[:, None].expand(-1, 2))
    logits_PV.requires_grad_()
    found = values_of(loss, logits_PV, rows, case.context)
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(logits_PV.grad).all()


BOUNDED = ("reverse_kl", "jensen_shannon", "total_variation", "skew_kl", "skew_reverse_kl")


@loop("name", BOUNDED)
def test_a_student_that_rules_out_all_kept_ids_has_a_finite_loss_and_gradient(name):
    case = make_case(top_k=3, masked=False)
    logits_PV = dense_logits(case).detach().scatter(1, case.rows.ids_PK, -torch.inf).requires_grad_()
    values_P = values_of(LOSSES[name](weight=1.0), logits_PV, case.rows, case.context)
    assert (torch.isfinite(values_P) & (values_P > 0)).all()
    values_P.sum().backward()
    assert torch.isfinite(logits_PV.grad).all()


def test_such_a_student_has_a_huge_forward_kl_and_a_finite_gradient():
    case = make_case(top_k=3, masked=False)
    logits_PV = dense_logits(case).detach().scatter(1, case.rows.ids_PK, -torch.inf).requires_grad_()
    for temperature in (1.0, 2.0):
        loss = ForwardKL(weight=1.0, temperature=temperature)
        values_P = values_of(loss, logits_PV, case.rows, case.context)
        assert (values_P > 1e30).all()
        (gradient_PV,) = torch.autograd.grad(values_P.sum(), logits_PV)
        assert torch.isfinite(gradient_PV).all()


def test_a_tiny_tail_keeps_its_digits_in_float32():
    # 1 - sum of the kept probabilities is 0 or negative in float32 here; the tail must come from its own logits.
    student_PV = torch.tensor([[30.0, 29.0, 0.0, -1.0]])
    rows = teacher_rows(student_PV.double(), 2, torch.tensor([3]))
    view = ChunkView(student_PV, rows)
    expected = student_PV.double().log_softmax(1)
    assert view.student_log_tail_C is not None
    torch.testing.assert_close(view.student_log_tail_C.double(), expected[:, 2:].logsumexp(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(view.gold_logprob_C.double(), expected[:, 3], rtol=1e-6, atol=0)


def test_an_extreme_tail_has_a_finite_gradient():
    # The tail's share of the student's mass is exp(-200): 0 in float32, yet the teacher gives it a third.
    student_PV = torch.tensor([[200.0, 199.0, 0.0, -1.0]], requires_grad=True)
    rows = teacher_rows(torch.tensor([[1.0, 1.0, 0.3, 0.3]]), 2, torch.tensor([2]))
    FORWARD_KL.values(ChunkView(student_PV, rows)).sum().backward()
    tail_mass = float(rows.log_tail_P.exp())
    assert float(student_PV.grad[0, 2:].sum()) == pytest.approx(-tail_mass, rel=1e-5)


def test_cross_entropy_is_torchs():
    case = make_case()
    found = values_of(CrossEntropy(weight=1.0), dense_logits(case), case.rows)
    expected = torch.nn.functional.cross_entropy(dense_logits(case), case.rows.labels_P, reduction="none")
    torch.testing.assert_close(found, expected)


def test_asking_twice_for_a_gradient_that_was_made_in_place_is_an_error():
    case = make_case(masked=False)
    logits_PV = dense_logits(case).detach().requires_grad_()
    total = values_of(FORWARD_KL, logits_PV, case.rows).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
