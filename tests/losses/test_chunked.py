from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.losses import ChunkView, Loss, ObjectiveConfig, score_positions
from kdcache.losses.kernel import Work, weighted_sum
from kdcache.models.lm_head import LMHead
from tests.loops import loop
from tests.losses.oracle import Case, dense_loss, make_case, with_teacher_head
from tests.losses.test_objective import BOTH, CONFIGS, SETTINGS, TEMPERED, gradients, loss_of

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


@loop("config", [BOTH, TEMPERED], ids=["both", "tempered"])
@loop("mode", ["float32", "bfloat16", "autocast"])
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


#: The last is there only in builds of torch with oneDNN (see kdcache.models.products).
PRODUCTS = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.addmm_,
    getattr(torch.ops.mkldnn, "_linear_pointwise", None),
)


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
        self.num_products += func.overloadpacket in PRODUCTS
        return out


@loop("softcap", [None, 5.0])
@loop("config", [*CONFIGS.values(), *SETTINGS.values()], ids=[*CONFIGS, *SETTINGS])
def test_no_array_of_positions_times_vocabulary_exists(config, softcap):
    num_positions, vocab_size, chunk = 64, 500, 8
    case = make_case(num_positions, vocab_size, masked=False, softcap=softcap).to(torch.float32)
    is_full = getattr(config.forward_kl, "mode", None) == "full"
    if is_full:
        case = with_teacher_head(case)
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
    # Per chunk: head product, gradient of hidden states, gradient of the weight, and the teacher's head product where
    # there is one; no product is made twice.
    assert watch.num_products == (4 if is_full else 3) * math.ceil(num_positions / chunk)


def test_masked_positions_do_not_go_through_the_head():
    case = make_case(num_positions=64, masked=False).to(torch.float32)
    mask_P = torch.zeros(64, dtype=torch.bool)
    mask_P[5:9] = True
    with Watch() as watch:
        loss_of(replace(case, rows=replace(case.rows, loss_mask_P=mask_P)), chunk=4)
    assert watch.num_products == 3
