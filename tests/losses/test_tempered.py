from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses import ChunkView, ForwardKL, Objective, ObjectiveConfig, TeacherContext
from kdcache.models.lm_head import LMHead
from tests.loops import loop
from tests.losses.oracle import GRID, Case, dense_logits, dense_loss, make_case, with_teacher_head

TEMPERATURES = [0.5, 1.0, 2.0, 4.0]


def live_kl(teacher_logits_PV: Tensor, student_logits_PV: Tensor, temperature: float) -> Tensor:
    """What a training step with the teacher in memory computes, in torch's own words."""
    log_t_PV = (teacher_logits_PV / temperature).log_softmax(1)
    log_p_PV = (student_logits_PV / temperature).log_softmax(1)
    return temperature**2 * torch.nn.functional.kl_div(log_p_PV, log_t_PV, reduction="none", log_target=True).sum(1)


def full(temperature: float) -> ObjectiveConfig:
    return ObjectiveConfig(forward_kl=ForwardKL(weight=1.0, temperature=temperature))


def loss_of(case: Case, config: ObjectiveConfig, context: TeacherContext, chunk: int = 4) -> Tensor:
    return Objective(config, chunk_positions=chunk, context=context)(case.hidden_PD, case.head, case.rows, 7).loss


# --------------------------------------------------------------------------------------------- full


@loop("changes", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"scale": 2.0, "softcap": 5.0}])
@loop("temperature", TEMPERATURES)
def test_hidden_state_and_head_are_the_live_teacher(temperature, changes):
    case = with_teacher_head(make_case(masked=False), dtype=torch.float32, **changes).to(torch.float32)
    head = case.context.head
    live_PV = head.logits(case.rows.hidden_PD)
    assert torch.equal(ChunkView(dense_logits(case).float(), case.rows, case.context).teacher_logits_CU, live_PV)
    found = loss_of(case, full(temperature), replace(case.context, kind="hidden"))
    student_PV = case.head.logits(case.hidden_PD)
    expected = live_kl(live_PV, student_PV, temperature).sum() / 7
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, live in zip(
        torch.autograd.grad(found, case.leaves()), torch.autograd.grad(expected, case.leaves()), strict=True
    ):
        torch.testing.assert_close(mine, live, rtol=1e-5, atol=1e-5)


@loop("dtype", [torch.bfloat16, torch.float16])
@loop("temperature", TEMPERATURES)
def test_half_precision_heads_answer_as_the_teacher_did_in_that_precision(temperature, dtype):
    case = with_teacher_head(make_case(masked=False), dtype=dtype).to(torch.float32)
    head = case.context.head
    assert head.weight_VD.dtype == dtype
    live_PV = head.logits(case.rows.hidden_PD.to(dtype)).float()
    found = loss_of(case, full(temperature), case.context)
    expected = live_kl(live_PV, case.head.logits(case.hidden_PD), temperature).sum() / 7
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    exact = with_teacher_head(make_case(masked=False))
    exact_loss = loss_of(exact, full(temperature), exact.context)
    assert float(found.detach()) == pytest.approx(float(exact_loss.detach()), rel=8 * torch.finfo(dtype).eps)


def test_the_head_is_used_unless_another_mode_is_asked_for():
    case = with_teacher_head(make_case(masked=False))
    student_PV = dense_logits(case)
    rows, context = case.rows, case.context

    def values(**settings: object) -> Tensor:
        return ForwardKL.model_validate({"weight": 1.0, **settings}).values(ChunkView(student_PV, rows, context))

    exact_P = live_kl(case.teacher_logits_PV, student_PV, 1.0)
    torch.testing.assert_close(values(), exact_P)
    torch.testing.assert_close(values(mode="full"), exact_P)
    assert bool((values(mode="decoupled") < exact_P - 1e-6).all())
    torch.testing.assert_close(values(mode="grid"), values(mode="decoupled"))


@loop("top_k", [1, 5, 30])
def test_the_bucket_is_below_the_full_divergence(top_k):
    case = with_teacher_head(make_case(num_positions=200, top_k=top_k, masked=False))
    view = ChunkView(dense_logits(case), case.rows, case.context)
    exact_P = ForwardKL(weight=1.0).values(view)
    bucket_P = ForwardKL(weight=1.0, mode="decoupled").values(view)
    assert bool((bucket_P <= exact_P + 1e-12).all())


@loop("temperature", TEMPERATURES)
def test_ids_that_the_teacher_rules_out_get_no_probability(temperature):
    case = make_case(masked=False)
    ruled_out = torch.tensor([3, 17, 30])
    bias_V = torch.zeros(31, dtype=torch.float64).index_fill(0, ruled_out, -torch.inf)
    context = replace(case.context, head=LMHead(torch.eye(31, dtype=torch.float64), bias_V))
    logits_PV = dense_logits(case).detach().requires_grad_()
    values_P = ForwardKL(weight=1.0, temperature=temperature).values(ChunkView(logits_PV, case.rows, context))
    target_PV = ((case.teacher_logits_PV + bias_V) / temperature).softmax(1)
    student_PV = (logits_PV / temperature).log_softmax(1)
    expected_P = temperature**2 * (torch.special.xlogy(target_PV, target_PV) - target_PV * student_PV).sum(1)
    torch.testing.assert_close(values_P, expected_P)
    (found_PV,) = torch.autograd.grad(values_P.sum(), logits_PV)
    (expected_PV,) = torch.autograd.grad(expected_P.sum(), logits_PV)
    torch.testing.assert_close(found_PV, expected_PV)


def test_a_student_that_rules_out_the_same_ids_has_a_finite_loss_and_one_that_rules_out_others_has_not():
    case = make_case(masked=False)
    bias_V = torch.zeros(31, dtype=torch.float64).index_fill(0, torch.tensor([3, 17]), -torch.inf)
    context = replace(case.context, head=LMHead(torch.eye(31, dtype=torch.float64), bias_V))
    logits_PV = (dense_logits(case).detach() + bias_V).requires_grad_()
    loss = ForwardKL(weight=1.0)
    values_P = loss.values(ChunkView(logits_PV, case.rows, context))
    assert values_P.isfinite().all()
    (gradient_PV,) = torch.autograd.grad(values_P.sum(), logits_PV)
    assert gradient_PV.isfinite().all()
    assert gradient_PV[:, [3, 17]].abs().sum() == 0
    unforgiving = replace(context, head=LMHead(torch.eye(31, dtype=torch.float64)))
    assert bool(loss.values(ChunkView(logits_PV.detach(), case.rows, unforgiving)).isposinf().all())


def test_asking_twice_for_a_gradient_that_was_made_in_place_is_an_error():
    case = with_teacher_head(make_case(masked=False))
    logits_PV = dense_logits(case).detach().requires_grad_()
    total = ForwardKL(weight=1.0).values(ChunkView(logits_PV, case.rows, case.context)).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_batch_without_what_the_mode_needs_names_the_key():
    case = with_teacher_head(make_case(masked=False))
    bare = replace(case, rows=replace(case.rows, hidden_PD=None, log_tails_PG=None))
    with pytest.raises(ConfigError, match="needs teacher_hidden in every training batch, found none; read this field"):
        loss_of(bare, full(1.0), case.context)
    grid = ObjectiveConfig(forward_kl=ForwardKL(weight=1.0, temperature=GRID[0], mode="grid"))
    with pytest.raises(ConfigError, match="needs teacher_log_tails in every training batch"):
        loss_of(bare, grid, case.context)


# --------------------------------------------------------------------------------------------- grid


def test_no_two_modes_agree_at_a_temperature_other_than_one():
    case = with_teacher_head(make_case(masked=False))
    view = ChunkView(dense_logits(case), case.rows, case.context)
    modes = ("decoupled", "grid", "full")
    values = [ForwardKL(weight=1.0, temperature=2.5, mode=mode).values(view) for mode in modes]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.isclose(values[one], values[other], rtol=1e-3).any()
    assert bool((values[1] <= values[2] + 1e-12).all())  # the grid is a coarsening of the full divergence


@loop("temperature", GRID)
def test_grid_over_the_whole_vocabulary_is_the_full_divergence(temperature):
    case = make_case(top_k=31)
    config = ObjectiveConfig(forward_kl=ForwardKL(weight=1.0, temperature=temperature, mode="grid"))
    found = loss_of(case, config, case.context)
    expected = live_kl(case.teacher_logits_PV, dense_logits(case), temperature)[case.rows.loss_mask_P].sum() / 7
    torch.testing.assert_close(found, expected)
    for mine, dense in zip(
        torch.autograd.grad(found, case.leaves()), torch.autograd.grad(expected, case.leaves()), strict=True
    ):
        torch.testing.assert_close(mine, dense)


@loop("temperature", GRID)
@loop("top_k", [1, 6, 30])
def test_grid_is_the_coarsened_divergence_of_both_models_at_the_temperature(temperature, top_k):
    case = make_case(top_k=top_k)
    ids_PK = case.rows.ids_PK
    student_PV, teacher_PV = ((x / temperature).softmax(1) for x in (dense_logits(case), case.teacher_logits_PV))

    def coarse(probs_PV: Tensor) -> Tensor:
        tail_P1 = probs_PV.scatter(1, ids_PK, 0.0).sum(1, keepdim=True)
        return torch.cat([probs_PV.gather(1, ids_PK), tail_P1], 1)

    t, p = coarse(teacher_PV), coarse(student_PV)
    loss = ForwardKL(weight=1.0, temperature=temperature, mode="grid")
    found = loss.values(ChunkView(dense_logits(case), case.rows, case.context))
    torch.testing.assert_close(found, temperature**2 * (t * (t / p).log()).sum(1), rtol=1e-10, atol=1e-10)


def test_a_stored_temperature_is_found_although_it_was_written_as_a_decimal():
    context = TeacherContext(temperatures=(0.1 + 0.2, 2.0))
    assert context.grid_index(0.3) == 0
    assert context.grid_index(2) == 1
    assert context.grid_index(2.001) is None


@loop("temperature", [0.1, 0.5, 2.5, 20.0])
def test_extreme_student_logits_stay_finite_in_float32(temperature):
    case = make_case(masked=False)
    rows = replace(case.rows, log_tails_PG=(case.rows.log_tails_PG[:, :1]))
    context = replace(case.context, temperatures=(temperature,))
    logits_PV = (60.0 * dense_logits(case)).float().detach().requires_grad_()
    for mode in ("decoupled", "grid"):
        loss = ForwardKL(weight=1.0, temperature=temperature, mode=mode)
        values_P = loss.values(ChunkView(logits_PV, rows, context))
        (gradient_PV,) = torch.autograd.grad(values_P.sum(), logits_PV)
        assert values_P.isfinite().all()
        assert gradient_PV.isfinite().all()


def test_all_modes_are_one_at_temperature_one_where_the_vocabulary_is_covered():
    case = with_teacher_head(make_case(top_k=31))
    expected = dense_loss(case, ObjectiveConfig(forward_kl=ForwardKL(weight=1.0)), 7)
    for mode in ("decoupled", "grid", "full"):
        config = ObjectiveConfig(forward_kl=ForwardKL(weight=1.0, mode=mode))
        torch.testing.assert_close(loss_of(case, config, case.context), expected)
