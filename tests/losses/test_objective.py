from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcache.errors import ConfigError, StudentError
from kdcache.losses import (
    CrossEntropy,
    ForwardKL,
    Objective,
    ObjectiveConfig,
    TeacherContext,
    TeacherRows,
)
from kdcache.models.lm_head import LMHead
from tests.loops import loop
from tests.losses.oracle import Case, dense_loss, dense_values, forward_kls, make_case

BOTH = ObjectiveConfig()
TEMPERED = ObjectiveConfig(forward_kl=ForwardKL(weight=0.7, temperature=2.5), cross_entropy=CrossEntropy(weight=0.3))
ONLY_CE = ObjectiveConfig(cross_entropy=CrossEntropy(weight=1.0))
CONFIGS = {"both": BOTH, "tempered": TEMPERED, "cross-entropy": ONLY_CE}
#: Every tail and mode alone and beside a cross-entropy, with which it shares a pass over the logits.
SETTINGS = {repr(loss): ObjectiveConfig(forward_kl=loss) for loss in forward_kls()} | {
    f"{loss!r} + CE": ObjectiveConfig(forward_kl=loss, cross_entropy=CrossEntropy(weight=0.3)) for loss in forward_kls()
}


def loss_of(case: Case, config: ObjectiveConfig = BOTH, num_valid: float | Tensor = 7.0, chunk: int = 4) -> Tensor:
    objective = Objective(config, chunk_positions=chunk, context=case.context_for(config))
    return objective(case.hidden_PD, case.head, case.rows, num_valid).loss


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(loss, case.leaves()))


def assert_same(case: Case, found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for mine, dense in zip(gradients(found, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(mine, dense, rtol=tolerance, atol=tolerance)


@loop("top_k", [1, 6, 31])
@loop("chunk", [1, 2, 3, 5, 8, 13, 100])
@loop("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_equal_plain_autograd_for_any_chunk_size(config, chunk, top_k):
    case = make_case(top_k=top_k)
    assert 0 < int(case.rows.loss_mask_P.sum()) < case.rows.num_positions
    assert_same(case, loss_of(case, config, 7.0, chunk), dense_loss(case, config, 7.0))


@loop("top_k", [1, 6, 30, 31])
@loop("chunk", [3, 13])
@loop("config", SETTINGS.values(), ids=SETTINGS)
def test_every_tail_and_mode_equals_plain_autograd(config, chunk, top_k):
    case = make_case(top_k=top_k)
    assert_same(case, loss_of(case, config, 7.0, chunk), dense_loss(case, config, 7.0))


@loop("changes", [{"bias": False}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 1.5}])
@loop("config", CONFIGS.values(), ids=CONFIGS)
def test_heads_of_other_families(config, changes):
    case = make_case(**changes)
    assert_same(case, loss_of(case, config), dense_loss(case, config, 7.0))


@loop("softcap", [None, 3.0])
@loop("config", [*CONFIGS.values(), *SETTINGS.values()], ids=[*CONFIGS, *SETTINGS])
def test_gradcheck(config, softcap):
    case = make_case(num_positions=5, vocab_size=7, width=3, top_k=3, masked=False)

    def loss(hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        head = LMHead(weight_VD, bias_V, softcap=softcap)
        objective = Objective(config, chunk_positions=2, context=case.context_for(config))
        return objective(hidden_PD, head, case.rows, 5).loss

    assert torch.autograd.gradcheck(loss, case.leaves())


def test_tied_weights_collect_both_gradients():
    case = make_case(bias=False)
    tokens_P = torch.arange(case.rows.num_positions)

    def tied(weight_VD: Tensor) -> Case:
        return replace(case, hidden_PD=weight_VD[tokens_P].tanh(), head=LMHead(weight_VD))

    (found,) = torch.autograd.grad(loss_of(tied(case.head.weight_VD)), case.head.weight_VD)
    (expected,) = torch.autograd.grad(dense_loss(tied(case.head.weight_VD), BOTH, 7.0), case.head.weight_VD)
    torch.testing.assert_close(found, expected)


def test_narrowed_head_reaches_the_whole_parameter():
    case = make_case()
    wide = make_case(vocab_size=40).head
    found = Objective(chunk_positions=4)(case.hidden_PD, wide.narrow(31), case.rows, 7).loss
    found.backward()
    assert wide.weight_VD.grad is not None
    assert wide.weight_VD.grad[:31].abs().sum() > 0
    assert wide.weight_VD.grad[31:].abs().sum() == 0


def test_frozen_parts_get_no_gradient_and_change_nothing():
    case = make_case()
    expected = gradients(dense_loss(case, BOTH, 7.0), case)
    frozen_head = replace(case.head, weight_VD=case.head.weight_VD.detach(), bias_V=case.head.bias_V.detach())
    (grad_hidden,) = torch.autograd.grad(loss_of(replace(case, head=frozen_head)), case.hidden_PD)
    torch.testing.assert_close(grad_hidden, expected[0])
    frozen_body = replace(case, hidden_PD=case.hidden_PD.detach())
    grad_weight, grad_bias = gradients(loss_of(frozen_body), frozen_body)
    torch.testing.assert_close(grad_weight, expected[1])
    torch.testing.assert_close(grad_bias, expected[2])
    assert not loss_of(replace(frozen_body, head=frozen_head)).requires_grad


def test_without_grad_the_value_is_the_same_and_nothing_is_differentiated(monkeypatch):
    case = make_case()
    expected = loss_of(case).detach()

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a gradient was computed under no_grad")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    with pytest.raises(AssertionError, match="a gradient was computed"):
        loss_of(case)
    with torch.no_grad():
        found = loss_of(case)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_sums_are_unweighted_and_count_valid_positions_only():
    case = make_case()
    output = Objective(TEMPERED, chunk_positions=3)(case.hidden_PD, case.head, case.rows, 1000)
    mask_P = case.rows.loss_mask_P
    assert list(output.sums) == ["forward_kl", "cross_entropy"]
    assert output.num_valid == int(mask_P.sum())
    for name, loss in TEMPERED.losses.items():
        assert not output.sums[name].requires_grad
        torch.testing.assert_close(output.sums[name], dense_values(case, loss)[mask_P].sum().detach())


def test_weight_zero_is_measured_but_not_trained_on():
    case = make_case()
    measured = ObjectiveConfig(forward_kl=ForwardKL(weight=0.0), cross_entropy=CrossEntropy(weight=1.0))
    output = Objective(measured, chunk_positions=4)(case.hidden_PD, case.head, case.rows, 7)
    assert float(output.sums["forward_kl"]) > 0
    assert_same(case, output.loss, dense_loss(case, ONLY_CE, 7.0))


def test_an_infinite_loss_of_weight_zero_does_not_spoil_the_others():
    case = make_case(bias=True, masked=False)
    bias_V = case.head.bias_V.detach().index_fill(0, case.rows.ids_PK[0, :1], -torch.inf).requires_grad_()
    labels_P = case.rows.ids_PK[:1, 1].expand(13)
    case = replace(case, head=replace(case.head, bias_V=bias_V), rows=replace(case.rows, labels_P=labels_P))
    measured = ObjectiveConfig(forward_kl=ForwardKL(weight=0.0), cross_entropy=CrossEntropy(weight=1.0))
    output = Objective(measured, chunk_positions=4)(case.hidden_PD, case.head, case.rows, 7)
    assert float(output.sums["forward_kl"]) == math.inf
    torch.testing.assert_close(output.loss, dense_loss(case, ONLY_CE, 7.0))


# --------------------------------------------------------------------------------------------- nothing to learn from


@loop("num_valid", [0, 9, torch.tensor(0), torch.tensor(9.0)], ids=repr)
@loop("num_positions", [0, 1, 6])
@loop("config", SETTINGS.values(), ids=SETTINGS)
def test_without_valid_positions_everything_is_exactly_zero(config, num_positions, num_valid):
    case = make_case(num_positions=num_positions)
    rows = replace(case.rows, loss_mask_P=torch.zeros_like(case.rows.loss_mask_P))
    output = Objective(config, context=case.context_for(config))(case.hidden_PD, case.head, rows, num_valid)
    assert float(output.loss.detach()) == 0
    assert output.num_valid == 0
    assert [float(value) for value in output.sums.values()] == [0] * len(config.losses)
    for gradient in gradients(output.loss, case):
        assert gradient.abs().sum() == 0


def test_a_denominator_of_zero_gives_zero_not_nan():
    case = make_case()
    for zero in (0, torch.tensor(0)):
        loss = loss_of(case, num_valid=zero)
        assert float(loss.detach()) == 0
        assert all(gradient.abs().sum() == 0 for gradient in gradients(loss, case))


@loop("config", SETTINGS.values(), ids=SETTINGS)
def test_one_position(config):
    case = make_case(num_positions=1, masked=False)
    assert_same(case, loss_of(case, config, num_valid=1), dense_loss(case, config, 1))


@loop("config", SETTINGS.values(), ids=SETTINGS)
def test_masked_positions_may_hold_garbage(config):
    case = make_case()
    mask_P = case.rows.loss_mask_P
    labels_P = torch.where(mask_P, case.rows.labels_P, -100)
    rubbish = {
        name: torch.where(mask_P[:, None], getattr(case.rows, name), torch.nan)
        for name in ("logprobs_PK", "log_tails_PG", "hidden_PD")
    }
    spoilt = replace(case, rows=replace(case.rows, labels_P=labels_P, **rubbish))
    assert_same(case, loss_of(spoilt, config), dense_loss(case, config, 7.0))


# --------------------------------------------------------------------------------------------- composition of batches


def total_gradients(batches: list[Case], case: Case, num_valid: float | Tensor) -> list[Tensor]:
    loss = sum(loss_of(batch, num_valid=num_valid) for batch in batches)
    return gradients(loss, case)


def rows_of(case: Case, indices: Tensor) -> Case:
    return replace(case, hidden_PD=case.hidden_PD[indices], rows=case.rows.select(indices))


@loop("num_valid", [9, torch.tensor(9)], ids=repr)
def test_micro_batches_order_and_padding_do_not_change_the_gradient(num_valid):
    case = make_case()
    expected = gradients(dense_loss(case, BOTH, 9), case)
    every = torch.arange(case.rows.num_positions)
    shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))]
    padding = replace(case.rows, loss_mask_P=torch.zeros_like(case.rows.loss_mask_P))
    padded_rows = TeacherRows(
        **{name: torch.cat([value, getattr(padding, name)]) for name, value in vars(case.rows).items()}
    )
    padded = replace(case, hidden_PD=torch.cat([case.hidden_PD, case.hidden_PD]), rows=padded_rows)
    for batches in (
        [rows_of(case, part) for part in every.split(4)],
        [rows_of(case, part) for part in every.split(1)],
        [rows_of(case, part) for part in every.tensor_split([0, 2, 13])],  # empty ones at both ends
        [rows_of(case, shuffled)],
        [padded],
    ):
        for mine, dense in zip(total_gradients(batches, case, num_valid), expected, strict=True):
            torch.testing.assert_close(mine, dense)


def test_backward_multiplies_by_the_incoming_scalar():
    case = make_case()
    for mine, dense in zip(
        gradients(loss_of(case) * 1024.0, case), gradients(dense_loss(case, BOTH, 7.0), case), strict=True
    ):
        torch.testing.assert_close(mine, 1024.0 * dense)


# --------------------------------------------------------------------------------------------- mistakes


def test_rows_of_other_positions_are_refused():
    case = make_case()
    with pytest.raises(StudentError, match="13 rows for 12 hidden states"):
        loss_of(replace(case, hidden_PD=case.hidden_PD[1:]))


def test_ids_outside_the_students_vocabulary_are_refused():
    case = make_case(masked=False)
    small = replace(case, head=case.head.narrow(9))
    with pytest.raises(StudentError, match=r"must have a row for each of the teacher's 31 ids, found 9.*one tokenizer"):
        loss_of(small)
    unknown = replace(small, context=TeacherContext())
    with pytest.raises(StudentError, match=r"teacher_ids must lie in 0\.\.8, the student's .*share one tokenizer"):
        loss_of(unknown)
    with pytest.raises(StudentError, match=r"teacher_ids must lie in 0\.\.19, the teacher's vocabulary; found"):
        loss_of(replace(case, context=TeacherContext(vocab_size=20)))
    labels_P = case.rows.labels_P.clone()
    labels_P[3] = -100
    with pytest.raises(StudentError, match=r"labels must lie in 0\.\.30.*found -100\.\."):
        loss_of(replace(case, rows=replace(case.rows, labels_P=labels_P)))


def test_a_chunk_of_no_positions_is_refused():
    with pytest.raises(ConfigError, match="chunk_positions must be at least 1, found 0"):
        Objective(chunk_positions=0)
