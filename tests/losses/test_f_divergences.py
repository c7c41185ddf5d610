from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kdcache.losses import (
    LOSSES,
    ChunkView,
    CrossEntropy,
    ForwardKL,
    Loss,
    Objective,
    ObjectiveConfig,
    TeacherContext,
    TeacherRows,
    incompatibility,
)
from kdcache.losses.divergences import (
    LEAST_LOG_PROB,
    FDivergence,
    JensenShannon,
    LogitsMSE,
    Ranking,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from kdcache.models.lm_head import LMHead
from tests.loops import loop
from tests.losses.oracle import (
    Case,
    dense_logits,
    dense_loss,
    dense_values,
    hybrid_case,
    make_case,
    other_losses,
    ragged_case,
    teacher_rows,
)

DIVERGENCES = [loss for loss in other_losses() if isinstance(loss, FDivergence)]
AT_ONE = [loss for loss in DIVERGENCES if loss.temperature == 1.0 and loss.mode is None]
RAGGED = torch.tensor([1, 8, 3, 5, 2, 7])
CASES = {
    "bucket": lambda: make_case(7),
    "one id": lambda: make_case(7, top_k=1),
    "whole vocabulary": lambda: make_case(7, top_k=31),
    "ragged": lambda: ragged_case(RAGGED),
    "hybrid": lambda: hybrid_case(num_positions=7),
    "hybrid of one id": lambda: hybrid_case(1, num_positions=7),
}


def values_and_gradient(loss: Loss, case: Case, logits_PV: Tensor) -> tuple[Tensor, Tensor]:
    logits_PV = logits_PV.detach().requires_grad_()
    values_P = loss.values(ChunkView(logits_PV, case.rows, case.context_for(loss)))
    (gradient_PV,) = torch.autograd.grad(values_P.sum(), logits_PV)
    return values_P.detach(), gradient_PV


def student(case: Case, logits_PV: Tensor) -> Case:
    """The case with a student that has these logits, for the oracle: its hidden states are they."""
    head = LMHead(torch.eye(logits_PV.shape[1], dtype=torch.float64))
    return replace(case, hidden_PD=logits_PV.detach().double().requires_grad_(), head=head)


def dense_values_and_gradient(loss: Loss, case: Case, logits_PV: Tensor) -> tuple[Tensor, Tensor]:
    dense = student(case, logits_PV)
    values_P = dense_values(dense, loss)
    (gradient_PV,) = torch.autograd.grad(values_P.sum(), dense.hidden_PD)
    return values_P.detach(), gradient_PV


def name_of(loss: Loss) -> str:
    return next(name for name, kind in LOSSES.items() if type(loss) is kind)


def possible(loss: Loss, case: Case) -> bool:
    """Hybrid caches cannot store tails at other temperatures; nor can the oracle temper what samples share."""
    return not (case.context.is_sampled and getattr(loss, "mode", None) == "grid")


# --------------------------------------------------------------------------------------------- against the oracle


@loop("kind", CASES)
@loop("loss", other_losses(), ids=repr)
def test_value_and_gradient_equal_the_dense_ones(loss, kind):
    case = CASES[kind]()
    if not possible(loss, case):
        assert "stores the tail at" in str(incompatibility(loss, replace(case.context, temperatures=())))
        return
    assert incompatibility(loss, case.context_for(loss)) is None
    logits_PV = dense_logits(case)
    found, expected = values_and_gradient(loss, case, logits_PV), dense_values_and_gradient(loss, case, logits_PV)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@loop("kind", ["bucket", "ragged", "hybrid"])
@loop("loss", other_losses(), ids=repr)
def test_objective_and_gradients_equal_the_dense_ones(loss, kind):
    case = CASES[kind]()
    if not possible(loss, case):
        return
    mask_P = torch.rand(case.rows.num_positions, generator=torch.Generator().manual_seed(8)) < 0.6
    case = replace(case, rows=replace(case.rows, loss_mask_P=mask_P))
    config = ObjectiveConfig.model_validate({name_of(loss): loss})
    objective = Objective(config, chunk_positions=4, context=case.context_for(loss))
    found, expected = objective(case.hidden_PD, case.head, case.rows, 7).loss, dense_loss(case, config, 7)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(value, case.leaves(), retain_graph=True) for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@loop("loss", other_losses(), ids=repr)
def test_all_masked_one_position_and_none_at_all(loss):
    config = ObjectiveConfig.model_validate({name_of(loss): loss})
    for num_positions, masked in ((1, False), (1, True), (0, False), (5, True)):
        case = make_case(num_positions=num_positions, masked=False)
        keep_P = torch.full((num_positions,), not masked)
        case = replace(case, rows=replace(case.rows, loss_mask_P=keep_P))
        output = Objective(config, context=case.context_for(loss))(case.hidden_PD, case.head, case.rows, num_positions)
        gradients = torch.autograd.grad(output.loss, case.leaves())
        if masked or not num_positions:
            assert float(output.loss.detach()) == 0
            assert all(gradient.abs().sum() == 0 for gradient in gradients)
        else:
            torch.testing.assert_close(output.loss, dense_loss(case, config, 1))
            assert all(gradient.isfinite().all() for gradient in gradients)


@loop("kind", ["bucket", "ragged", "hybrid"])
@loop("loss", other_losses(), ids=repr)
def test_gradcheck(loss, kind):
    settings = {"vocab_size": 7, "width": 3}
    case = {
        "bucket": lambda: make_case(num_positions=2, top_k=3, masked=False, **settings),
        "ragged": lambda: ragged_case(torch.tensor([2, 4]), 4, **settings),
        "hybrid": lambda: hybrid_case(3, 4, num_positions=2, masked=False, **settings),
    }[kind]()
    if not possible(loss, case):
        return
    # A view can be differentiated once only, and gradcheck does it twice; an objective's gradient is that of the view.
    objective = Objective(ObjectiveConfig.model_validate({name_of(loss): loss}), context=case.context_for(loss))
    logits_PV, head = dense_logits(case).detach().requires_grad_(), LMHead(torch.eye(7, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x_PV: objective(x_PV, head, case.rows, 1).loss, [logits_PV])


@loop("kind", CASES)
@loop("loss", other_losses(), ids=repr)
def test_float32_is_close_to_float64(loss, kind):
    case = CASES[kind]()
    if not possible(loss, case):
        return
    logits_PV = (3 * dense_logits(case)).float()
    values_P, gradient_PV = values_and_gradient(loss, case, logits_PV)
    assert values_P.dtype == torch.float32
    expected_P, expected_PV = dense_values_and_gradient(loss, case, logits_PV)
    torch.testing.assert_close(values_P.double(), expected_P, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_PV.double(), expected_PV, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- what a divergence is


@loop("dtype", [torch.float32, torch.float64])
@loop("kind", CASES)
@loop("loss", DIVERGENCES, ids=repr)
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(loss, kind, dtype):
    case = CASES[kind]()
    if not possible(loss, case):
        return
    values_P, gradient_PV = values_and_gradient(loss, case, (case.teacher_logits_PV + 7.0).to(dtype))
    rounding = (2e-6 if dtype == torch.float32 else 1e-12) * max(1.0, loss.temperature**2)
    assert float(values_P.abs().max()) < rounding
    if not isinstance(loss, TotalVariation):  # which has a kink there
        assert float(gradient_PV.abs().max()) < rounding
    others_P, _ = values_and_gradient(loss, case, (case.teacher_logits_PV.flip(0) + 7.0).to(dtype))
    # A position in the middle is its own mirror image.
    assert float(others_P.min()) > -rounding
    assert float(others_P.mean()) > 0.02


@loop("loss", AT_ONE, ids=repr)
def test_the_coarsened_divergence_grows_with_k_to_the_full_one(loss):
    case = make_case(num_positions=100, masked=False)
    logits_PV = dense_logits(case).detach()
    by_k = []
    for top_k in range(1, 32):
        rows = teacher_rows(case.teacher_logits_PV, top_k, case.rows.labels_P)
        by_k.append(loss.values(ChunkView(logits_PV, rows)))
    assert bool((torch.stack(by_k).diff(dim=0) >= -1e-12).all())
    full = loss.model_copy(update={"mode": "full"})
    full_P = full.values(ChunkView(logits_PV, case.rows, case.context_for(full)))
    torch.testing.assert_close(by_k[-1], full_P, rtol=1e-10, atol=1e-10)
    assert float((full_P - by_k[5]).mean()) > 1e-3


@loop("temperature", [0.5, 2.5])
@loop("divergence", [type(loss) for loss in AT_ONE])
def test_grid_is_below_full_and_equal_to_it_over_the_whole_vocabulary(divergence, temperature):
    for top_k in (6, 31):
        case = make_case(top_k=top_k, masked=False)
        grid, full = (divergence(weight=1.0, temperature=temperature, mode=mode) for mode in ("grid", "full"))
        grid_P, full_P = (values_and_gradient(loss, case, dense_logits(case))[0] for loss in (grid, full))
        assert bool((grid_P <= full_P + 1e-12).all())
        assert bool((full_P - grid_P).max() > 1e-3) is (top_k < 31)


@loop("divergence", [ForwardKL, *(type(loss) for loss in AT_ONE)])
def test_gradients_keep_their_length_as_the_temperature_grows(divergence):
    case = make_case(masked=False)
    losses = [divergence(weight=1.0, mode="full", temperature=temperature) for temperature in (50.0, 100.0)]
    at_50, at_100 = (float(values_and_gradient(loss, case, dense_logits(case))[1].norm()) for loss in losses)
    assert at_100 == pytest.approx(at_50, rel=0.01)


@loop("kind", CASES)
def test_decoupled_reverse_kl_near_temperature_one_is_the_bucket(kind):
    case = CASES[kind]()
    near, one = (ReverseKL(weight=1.0, temperature=t) for t in (1.0 + 1e-9, 1.0))
    found, expected = (values_and_gradient(loss, case, dense_logits(case)) for loss in (near, one))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_a_hybrid_row_is_the_row_of_its_kept_ids_whatever_was_drawn():
    hybrid = CASES["hybrid"]()
    plain = make_case(top_k=4, num_positions=7)
    for loss in other_losses():
        if getattr(loss, "mode", None) in ("grid", "full"):
            continue
        found, expected = (values_and_gradient(loss, case, dense_logits(case)) for case in (hybrid, plain))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_more_pads_change_nothing():
    case = ragged_case(RAGGED)
    wider = replace(
        case.rows,
        ids_PK=torch.cat([case.rows.ids_PK, case.rows.ids_PK[:, :1].expand(-1, 40)], 1),
        logprobs_PK=torch.nn.functional.pad(case.rows.logprobs_PK, (0, 40), value=-torch.inf),
    )
    for loss in other_losses():
        found, expected = (
            values_and_gradient(loss, other, dense_logits(case)) for other in (replace(case, rows=wider), case)
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------- known values


def two_ids(teacher: float, student: float) -> ChunkView:
    """Two ids of which the first has these probabilities; both are kept."""
    t, p = (torch.tensor([[x, 1 - x]], dtype=torch.float64) for x in (teacher, student))
    rows = TeacherRows(
        torch.tensor([[0, 1]]),
        t.log(),
        torch.tensor([-torch.inf]),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1, dtype=torch.bool),
    )
    return ChunkView(p.log() + 5.0, rows)


@loop(
    ("loss", "expected"),
    [
        (ReverseKL(weight=1), 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)),
        (JensenShannon(weight=1), 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)),
        (TotalVariation(weight=1), 0.5),
        (SkewKL(weight=1, alpha=0.5), 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)),
        (SkewKL(weight=1), 0.75 * math.log(0.75 / 0.3) + 0.25 * math.log(0.25 / 0.7)),
        (SkewReverseKL(weight=1), 0.25 * math.log(0.25 / 0.7) + 0.75 * math.log(0.75 / 0.3)),
        (LogitsMSE(weight=1), math.log(3) ** 2),
        (Ranking(weight=1), -math.log(0.25)),
    ],
    ids=repr,
)
def test_two_ids(loss, expected):
    assert float(loss.values(two_ids(0.75, 0.25))) == pytest.approx(expected, rel=1e-12)


def test_the_ends_of_jensen_shannon_are_the_two_kls_and_its_slopes():
    case = make_case()
    logits_PV = 0.3 * dense_logits(case)  # no id so improbable that a 1e-7th of the teacher counts beside it

    def values(loss: Loss) -> tuple[Tensor, Tensor]:
        return values_and_gradient(loss, case, logits_PV)

    forward, reverse = values(ForwardKL(weight=1.0)), values(ReverseKL(weight=1.0))
    for beta, limit in ((0.0, forward), (1.0, reverse)):
        torch.testing.assert_close(values(JensenShannon(weight=1.0, beta=beta)), limit)
        inside = values(JensenShannon(weight=1.0, beta=abs(beta - 1e-7)))
        torch.testing.assert_close(tuple(part / 1e-7 for part in inside), limit, rtol=1e-4, atol=1e-5)


def test_what_a_student_finds_all_but_impossible_keeps_its_gradient():
    case = make_case()
    logits_PV = 300.0 * dense_logits(case).detach()
    assert float(logits_PV.log_softmax(1).gather(1, case.rows.ids_PK).min()) < 2 * LEAST_LOG_PROB
    losses = (JensenShannon(weight=1.0, beta=0.0), ForwardKL(weight=1.0))
    torch.testing.assert_close(*(values_and_gradient(loss, case, logits_PV) for loss in losses))


def test_skewed_divergences_tend_to_the_two_kls():
    case = make_case()
    logits_PV = 0.3 * dense_logits(case)
    for skewed, limit in ((SkewKL, ForwardKL), (SkewReverseKL, ReverseKL)):
        found = values_and_gradient(skewed(weight=1.0, alpha=1e-9), case, logits_PV)
        torch.testing.assert_close(found, values_and_gradient(limit(weight=1.0), case, logits_PV), rtol=1e-5, atol=1e-5)


def test_reverse_kl_leaves_logits_outside_the_kept_ids_alone_where_their_mass_is_right():
    # Without the bucket every one of them would be pulled down.
    case = make_case(masked=False)
    outside_PV = torch.ones_like(case.teacher_logits_PV, dtype=torch.bool).scatter(1, case.rows.ids_PK, False)
    shuffled_PV = case.teacher_logits_PV.clone()
    shuffled_PV[outside_PV] = shuffled_PV[outside_PV].reshape(13, -1).flip(1).reshape(-1)
    values_P, gradient_PV = values_and_gradient(ReverseKL(weight=1.0), case, shuffled_PV)
    assert float(values_P.abs().max()) < 1e-12
    assert float(gradient_PV.abs().max()) < 1e-12


# --------------------------------------------------------------------------------------------- probabilities of 0


@loop("mode", [None, "full"])
@loop("divergence", [type(loss) for loss in AT_ONE])
def test_mass_that_the_teacher_rules_out_is_finite_and_goes_down(divergence, mode):
    # A student with five more ids than the teacher; in mode full they are ids, else all of the bucket.
    case = make_case(top_k=31, masked=False)
    random = torch.Generator().manual_seed(2)
    wide_PV = torch.randn(13, 36, generator=random, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        values_P, gradient_PV = values_and_gradient(divergence(weight=1.0, mode=mode), case, wide_PV.to(dtype))
        assert values_P.isfinite().all()
        assert gradient_PV.isfinite().all()
        assert bool((gradient_PV[:, 31:].sum(1) > 0).all())
    expected = dense_values_and_gradient(divergence(weight=1.0, mode=mode), case, wide_PV)
    torch.testing.assert_close((values_P, gradient_PV), expected, rtol=1e-10, atol=1e-10)


def test_a_reverse_kl_is_at_most_what_a_probability_of_zero_counts_as():
    view = two_ids(0.0, 1.0)
    assert float(ReverseKL(weight=1.0).values(view)) == -LEAST_LOG_PROB
    assert float(JensenShannon(weight=1.0, beta=1.0).values(view)) == -LEAST_LOG_PROB
    assert float(TotalVariation(weight=1.0).values(view)) == 1
    for skewed in (SkewKL, SkewReverseKL):
        assert float(skewed(weight=1.0).values(view)) == pytest.approx(-math.log(0.1))


@loop("temperature", [0.1, 0.5, 2.5])
@loop("kind", CASES)
@loop("name", [name for name in LOSSES if name != "forward_kl"])
def test_extreme_and_impossible_students_are_finite_in_float32(name, kind, temperature):
    case = CASES[kind]()
    loss = LOSSES[name](weight=1.0)
    losses = [loss]
    if isinstance(loss, FDivergence):
        context = replace(case.context, temperatures=(temperature, 2.5))
        modes = [mode for mode in loss.modes if not case.context.is_sampled or mode != "grid"]
        losses += [loss.model_copy(update={"temperature": temperature, "mode": mode}) for mode in modes]
        case = replace(case, context=context)
    logits_PV = 60.0 * dense_logits(case).float().detach()
    ids_PK, some = case.rows.ids_PK, torch.arange(31) >= 20
    students = {
        "sharp": logits_PV,
        "no mass on what is kept": logits_PV.scatter(1, ids_PK, -1e4),
        "some ids impossible": logits_PV.masked_fill(some, -torch.inf).scatter(1, ids_PK, 1.0),
        "tail impossible": torch.full_like(logits_PV, -torch.inf).scatter(1, ids_PK, 1.0),
    }
    if kind in ("bucket", "whole vocabulary", "hybrid"):
        students["a kept id impossible"] = logits_PV.scatter(1, ids_PK[:, :1], -torch.inf)
    labels_P = {name: logits.argmax(1) for name, logits in students.items()}
    for what, student_PV in students.items():
        for one in losses:
            settled = replace(case, rows=replace(case.rows, labels_P=labels_P[what]))
            values_P, gradient_PV = values_and_gradient(one, settled, student_PV)
            assert values_P.isfinite().all(), (what, one)
            assert gradient_PV.isfinite().all(), (what, one)


def test_an_underflowed_tail_of_the_teacher_is_finite():
    case = make_case(masked=False)
    kept_PK = case.rows.logprobs_PK.log_softmax(1)
    rows = replace(case.rows, logprobs_PK=kept_PK, log_tail_P=torch.full_like(case.rows.log_tail_P, -torch.inf))
    case = replace(case, rows=rows)
    for loss in AT_ONE:
        found = values_and_gradient(loss, case, dense_logits(case))
        torch.testing.assert_close(found, dense_values_and_gradient(loss, case, dense_logits(case)))


# --------------------------------------------------------------------------------------------- refusals and settings

HEAD = LMHead(torch.ones(9, 2))
CONTEXTS = {
    "top-k": TeacherContext(),
    "grid": TeacherContext(temperatures=(2.0, 4.0)),
    "ragged": TeacherContext(is_ragged=True),
    "sampled": TeacherContext("sampled"),
    "hybrid": TeacherContext("hybrid", num_kept=4),
    "hybrid of unknown width": TeacherContext("hybrid"),
    "hidden": TeacherContext("hidden", vocab_size=9, head=HEAD),
}


@loop("name", [name for name in LOSSES if name not in ("forward_kl", "cross_entropy")])
def test_draws_alone_are_refused_and_every_other_cache_allowed(name):
    for where, context in CONTEXTS.items():
        reason = incompatibility(LOSSES[name](weight=1.0), context)
        if where in ("sampled", "hybrid of unknown width"):
            assert reason is not None
            assert reason.startswith("it needs the ")
            assert "use a cache of top-k, hybrid or hidden targets" in reason
        else:
            assert reason is None, (where, reason)


@loop(
    ("loss", "where", "message"),
    [
        (JensenShannon(weight=1, mode="decoupled", temperature=2), "top-k", "mode decoupled needs a chain rule.*grid"),
        (JensenShannon(weight=1, temperature=2), "top-k", "at temperature 2, and the cache stores the tail at temp"),
        (TotalVariation(weight=1, temperature=3), "grid", "temperatures 2, 4; use temperature 1, one of these, or a c"),
        (SkewKL(weight=1, temperature=2), "hybrid", "temperature 1 only; use temperature 1, or a cache of hidden"),
        (SkewKL(weight=1, temperature=2), "top-k", "a dump stores the tail at others with --temperatures$"),
        (SkewKL(weight=1, temperature=2), "hybrid", "or a cache of hidden targets$"),
        (SkewReverseKL(weight=1, mode="full"), "top-k", "mode full needs the teacher's last hidden state"),
        (ReverseKL(weight=1, mode="grid", temperature=3), "grid", "use temperature 1, one of these, or mode decoupled"),
        (ReverseKL(weight=1, temperature=2), "sampled", "it needs the probabilities of the kept ids"),
    ],
    ids=repr,
)
def test_what_a_cache_cannot_give_is_refused(loss, where, message):
    reason = incompatibility(loss, CONTEXTS[where])
    assert reason is not None
    assert re.search(message, reason), reason


@loop("loss", [type(loss) for loss in AT_ONE])
def test_modes_by_default(loss):
    at_two = loss(weight=1.0, temperature=2.0)
    assert at_two.resolved_mode(CONTEXTS["hidden"]) == "full"
    assert at_two.resolved_mode(CONTEXTS["grid"]) == ("decoupled" if loss is ReverseKL else "grid")
    for where in ("grid", "hidden"):
        assert incompatibility(at_two, CONTEXTS[where]) is None
    assert incompatibility(loss(weight=1.0, mode="decoupled"), CONTEXTS["top-k"]) is None


@loop(
    ("loss", "settings"),
    [
        (JensenShannon, {"beta": -0.1}),
        (JensenShannon, {"beta": 1.1}),
        (JensenShannon, {"beta": math.nan}),
        (SkewKL, {"alpha": 0}),
        (SkewReverseKL, {"alpha": 1}),
        (Ranking, {"top_k": 1}),
        (LogitsMSE, {"temperature": 2}),
        (ReverseKL, {"tail": "drop"}),
    ],
)
def test_wrong_settings(loss, settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        loss.model_validate({"weight": 1.0, **settings})


def test_the_default_of_every_loss_needs_nothing_but_a_weight():
    assert all(loss(weight=1.0).needs for loss in LOSSES.values())
    assert not CrossEntropy.uses_teacher
    assert CrossEntropy(weight=1.0).sources == "the gold label; nothing of the teacher"
    assert all(loss(weight=1.0).sources == loss.needs for loss in LOSSES.values() if loss.uses_teacher)
