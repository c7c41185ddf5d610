from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.errors import ConfigError, StudentError
from kdcache.losses import (
    ChunkView,
    CrossEntropy,
    ForwardKL,
    Loss,
    Objective,
    ObjectiveConfig,
    TeacherRows,
    score_positions,
)
from kdcache.losses.chunked import Work, weighted_sum
from kdcache.models.lm_head import LMHead
from tests.losses.oracle import Case, dense_loss, dense_values, make_case

BOTH = ObjectiveConfig()
TEMPERED = ObjectiveConfig(forward_kl=ForwardKL(weight=0.7, temperature=2.5), cross_entropy=CrossEntropy(weight=0.3))
ONLY_CE = ObjectiveConfig(cross_entropy=CrossEntropy(weight=1.0))
CONFIGS = {"both": BOTH, "tempered": TEMPERED, "cross-entropy": ONLY_CE}


def loss_of(case: Case, config: ObjectiveConfig = BOTH, num_valid: float | Tensor = 7.0, chunk: int = 4) -> Tensor:
    return Objective(config, chunk_positions=chunk)(case.hidden_PD, case.head, case.rows, num_valid).loss


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(loss, case.leaves()))


def assert_same(case: Case, found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for mine, dense in zip(gradients(found, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(mine, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("top_k", [1, 6, 31])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 13, 100])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_equal_plain_autograd_for_any_chunk_size(config, chunk, top_k):
    case = make_case(top_k=top_k)
    assert 0 < int(case.rows.loss_mask_P.sum()) < case.rows.num_positions
    assert_same(case, loss_of(case, config, 7.0, chunk), dense_loss(case, config, 7.0))


@pytest.mark.parametrize("changes", [{"bias": False}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 1.5}])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_heads_of_other_families(config, changes):
    case = make_case(**changes)
    assert_same(case, loss_of(case, config), dense_loss(case, config, 7.0))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradcheck(config, softcap):
    case = make_case(num_positions=5, vocab_size=7, width=3, top_k=3, masked=False)

    def loss(hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        head = LMHead(weight_VD, bias_V, softcap=softcap)
        return Objective(config, chunk_positions=2)(hidden_PD, head, case.rows, 5).loss

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


@pytest.mark.parametrize("num_valid", [0, 9, torch.tensor(0), torch.tensor(9.0)], ids=repr)
@pytest.mark.parametrize("num_positions", [0, 1, 6])
def test_without_valid_positions_everything_is_exactly_zero(num_positions, num_valid):
    case = make_case(num_positions=num_positions)
    rows = replace(case.rows, loss_mask_P=torch.zeros_like(case.rows.loss_mask_P))
    output = Objective()(case.hidden_PD, case.head, rows, num_valid)
    assert float(output.loss.detach()) == 0
    assert output.num_valid == 0
    assert [float(value) for value in output.sums.values()] == [0, 0]
    for gradient in gradients(output.loss, case):
        assert gradient.abs().sum() == 0


def test_a_denominator_of_zero_gives_zero_not_nan():
    case = make_case()
    for zero in (0, torch.tensor(0)):
        loss = loss_of(case, num_valid=zero)
        assert float(loss.detach()) == 0
        assert all(gradient.abs().sum() == 0 for gradient in gradients(loss, case))


def test_one_position():
    case = make_case(num_positions=1, masked=False)
    assert_same(case, loss_of(case, num_valid=1), dense_loss(case, BOTH, 1))


def test_masked_positions_may_hold_garbage():
    case = make_case()
    mask_P = case.rows.loss_mask_P
    rubbish = torch.where(mask_P[:, None], case.rows.logprobs_PK, torch.nan)
    labels_P = torch.where(mask_P, case.rows.labels_P, -100)
    spoilt = replace(case, rows=replace(case.rows, logprobs_PK=rubbish, labels_P=labels_P))
    assert_same(case, loss_of(spoilt), dense_loss(case, BOTH, 7.0))


# --------------------------------------------------------------------------------------------- composition of batches


def total_gradients(batches: list[Case], case: Case, num_valid: float | Tensor) -> list[Tensor]:
    loss = sum(loss_of(batch, num_valid=num_valid) for batch in batches)
    return gradients(loss, case)


def rows_of(case: Case, indices: Tensor) -> Case:
    return replace(case, hidden_PD=case.hidden_PD[indices], rows=case.rows.select(indices))


@pytest.mark.parametrize("num_valid", [9, torch.tensor(9)], ids=repr)
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


# --------------------------------------------------------------------------------------------- precision


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float((mine.double() - right.double()).norm() / right.double().norm()) for mine, right in pairs]


def plain_gradients(case: Case, config: ObjectiveConfig, cast: torch.dtype) -> list[Tensor]:
    """What a usual training step gives: the whole head product in ``cast``, the loss in float32, autograd."""
    logits_PV = torch.nn.functional.linear(
        case.hidden_PD.to(cast), case.head.weight_VD.to(cast), case.head.bias_V.to(cast)
    )
    whole = replace(case, hidden_PD=logits_PV.float(), head=LMHead(torch.eye(logits_PV.shape[1])))
    return gradients(dense_loss(whole, config, case.rows.num_positions), case)


@pytest.mark.parametrize("config", [BOTH, TEMPERED], ids=["both", "tempered"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_lower_precision_is_as_good_as_a_plain_step_in_it(mode, config):
    weights = torch.bfloat16 if mode == "bfloat16" else torch.float32
    compute = torch.float32 if mode == "float32" else torch.bfloat16
    case = make_case(num_positions=600, vocab_size=200, width=32, top_k=20, masked=False).to(weights)
    exact_loss = dense_loss(case, config, 600)
    exact = gradients(exact_loss, case)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss = loss_of(case, config, 600, chunk=16)
    found = gradients(loss, case)
    assert loss.dtype == torch.float32
    assert [gradient.dtype for gradient in found] == [weights] * 3
    unit = torch.finfo(compute).eps
    assert float(loss.detach()) == pytest.approx(float(exact_loss.detach()), rel=4 * unit)
    plain = relative_errors(plain_gradients(case, config, compute), exact)
    for mine, usual in zip(relative_errors(found, exact), plain, strict=True):
        assert mine <= 1.2 * usual + unit / 100
        assert usual < 8 * unit  # else the comparison would mean nothing


def test_many_chunks_lose_no_digits_of_a_bfloat16_head_gradient():
    case = make_case(num_positions=600, vocab_size=50, width=16, masked=False).to(torch.bfloat16)
    one, many = (gradients(loss_of(case, chunk=chunk), case)[1] for chunk in (600, 2))
    exact = gradients(dense_loss(case, BOTH, 7.0), case)[1]
    assert relative_errors([many], [exact])[0] <= 1.2 * relative_errors([one], [exact])[0]


def test_autocast_cache_is_left_clean_for_later_users_of_a_tied_weight():
    case = make_case(bias=False).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(case)
        later = torch.nn.functional.linear(case.hidden_PD, case.head.weight_VD).float().sum()
    (gradient,) = torch.autograd.grad(later, case.head.weight_VD)
    assert gradient.abs().sum() > 0


class MatrixLoss(Loss):
    is_divergence = False

    def values(self, view: ChunkView) -> Tensor:
        product_C1 = view.logits_CV @ view.logits_CV.new_ones(view.logits_CV.shape[1], 1)
        assert product_C1.dtype == torch.float32
        return product_C1.squeeze(1)


def test_losses_run_in_float32_under_autocast_even_their_matrix_products():
    case = make_case().to(torch.float32)
    losses = {"matrix": MatrixLoss(weight=1.0)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = weighted_sum(case.hidden_PD, Work(losses, case.rows, case.head, 4))
        scores = score_positions(case.hidden_PD, case.head, case.rows, losses)
    torch.testing.assert_close(total, scores.losses["matrix"].sum())


def test_float64_students_stay_in_float64_under_autocast():
    case = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss_of(case).dtype == torch.float64


# --------------------------------------------------------------------------------------------- memory and work


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation makes and the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_array_of_positions_times_vocabulary_exists(config, softcap):
    num_positions, vocab_size, chunk = 64, 500, 8
    case = make_case(num_positions, vocab_size, masked=False, softcap=softcap).to(torch.float32)
    saved: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Watch() as watch:
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            loss = loss_of(case, config, num_positions, chunk)
            saved_outside_chunks = [size for size in saved if size > chunk * vocab_size]
        loss.backward()
    assert watch.largest == chunk * vocab_size
    assert saved_outside_chunks == []
    # Per chunk: head product, gradient of hidden states, gradient of the weight; no product is made twice.
    assert watch.num_products == 3 * math.ceil(num_positions / chunk)


def test_masked_positions_do_not_go_through_the_head():
    case = make_case(num_positions=64, masked=False).to(torch.float32)
    mask_P = torch.zeros(64, dtype=torch.bool)
    mask_P[5:9] = True
    with Watch() as watch:
        loss_of(replace(case, rows=replace(case.rows, loss_mask_P=mask_P)), chunk=4)
    assert watch.num_products == 3


# --------------------------------------------------------------------------------------------- mistakes


def test_rows_of_other_positions_are_refused():
    case = make_case()
    with pytest.raises(StudentError, match="13 rows for 12 hidden states"):
        loss_of(replace(case, hidden_PD=case.hidden_PD[1:]))


def test_ids_outside_the_students_vocabulary_are_refused():
    case = make_case(masked=False)
    small = replace(case, head=case.head.narrow(9))
    with pytest.raises(StudentError, match=r"teacher_ids must lie in 0\.\.8, .*share one tokenizer"):
        loss_of(small)
    labels_P = case.rows.labels_P.clone()
    labels_P[3] = -100
    with pytest.raises(StudentError, match=r"labels must lie in 0\.\.30.*found -100\.\."):
        loss_of(replace(case, rows=replace(case.rows, labels_P=labels_P)))


def test_a_chunk_of_no_positions_is_refused():
    with pytest.raises(ConfigError, match="chunk_positions must be at least 1, found 0"):
        Objective(chunk_positions=0)
