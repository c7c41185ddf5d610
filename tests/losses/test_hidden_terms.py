"""Terms over hidden states against the same maths written plainly, row by row, in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache.config import build
from kdcache.errors import ConfigError, StudentError
from kdcache.losses import TERMS, LayerStates, Objective, ObjectiveConfig, TeacherContext
from kdcache.losses.hidden import HiddenMSE, HiddenTerm
from tests.loops import loop
from tests.losses.oracle import Case, dense_loss, make_case

CONTEXT = TeacherContext(num_layers=4, layer_widths={0: 6, 2: 6, 4: 6})
#: Of a student with two blocks: the embeddings are narrower, the last state is as wide as the teacher's.
WIDTHS = (3, 5, 6)
EPS = 1e-6
SETTINGS: dict[str, dict[str, Any]] = {
    "mse": {"hidden_mse": {}},
    "mse none": {"hidden_mse": {"normalise": "none"}},
    "mse linear": {"hidden_mse": {"projection": "linear", "layers": {1: 4, 2: 0}}},
    "cosine": {"hidden_cosine": {}},
    "cosine of one pair": {"hidden_cosine": {"layers": {-1: "last"}, "projection": "none"}},
    "both": {"hidden_mse": {"layers": {1: 2}}, "hidden_cosine": {"layers": {1: 2, 0: 0}}},
}

HIDDEN_TERMS = [name for name, term in TERMS.items() if issubclass(term, HiddenTerm)]


def config_of(settings: dict[str, dict[str, Any]], weight: float = 0.7, **losses: Any) -> ObjectiveConfig:
    return build(ObjectiveConfig, {name: {"weight": weight, **given} for name, given in settings.items()} | losses)


def built(config: ObjectiveConfig, widths: tuple[int, ...] = WIDTHS, context: TeacherContext = CONTEXT) -> Objective:
    objective = Objective(config, context=context, chunk_positions=4)
    objective.build_terms(widths, seed=3)
    objective.terms.double()
    return objective


def states_for(case: Case, widths: tuple[int, ...] = WIDTHS, seed: int = 1, dtype: torch.dtype = torch.float64):
    random = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        # Lengths from 1 to 100, as with sinks.
        lengths = 10 ** (2 * torch.rand(case.rows.num_positions, 1, generator=random, dtype=torch.float64))
        return lengths * torch.randn(case.rows.num_positions, width, generator=random, dtype=torch.float64)

    student = {layer: normal(width).to(dtype).requires_grad_() for layer, width in enumerate(widths)}
    return LayerStates(student, {layer: normal(width).float() for layer, width in CONTEXT.layer_widths.items()})


def oracle(objective: Objective, states: LayerStates, name: str, row: int) -> Tensor:
    """The value of a term at one position: a loop over pairs and formulas of vectors."""
    term, module = getattr(objective.config, name), objective.terms[name]
    values = []
    for student_layer, teacher_layer in module.pairs.items():
        s, t = states.student[student_layer][row].double(), states.teacher[teacher_layer][row].double()
        if str(student_layer) in module.maps:
            s = module.maps[str(student_layer)].weight.double() @ s
        if name == "hidden_cosine":
            values.append(1 - (s @ t) / (s.norm() * t.norm()))
            continue
        scale = {"teacher": (t @ t / len(t) + EPS).sqrt(), "none": 1.0}[term.normalise]
        values.append(((s / scale - t / scale) ** 2).sum() / len(t))
    return sum(values, torch.zeros((), dtype=torch.float64)) / len(values)


def oracle_loss(objective: Objective, case: Case, states: LayerStates, num_valid: float) -> Tensor:
    total = dense_loss(case, replace_terms(objective.config), num_valid)
    for name in objective.terms:
        for row in case.rows.loss_mask_P.nonzero().squeeze(1).tolist():
            total = total + getattr(objective.config, name).weight * oracle(objective, states, name, row) / num_valid
    return total


def replace_terms(config: ObjectiveConfig) -> ObjectiveConfig:
    return config.model_copy(update=dict.fromkeys(TERMS))


def loss_of(objective: Objective, case: Case, states: LayerStates, num_valid: float | Tensor = 7.0) -> Tensor:
    return objective(case.hidden_PD, case.head, case.rows, num_valid, states).loss


def leaves_of(objective: Objective, case: Case, states: LayerStates) -> list[Tensor]:
    return [*case.leaves(), *states.student.values(), *objective.terms.parameters()]


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


CE = {"cross_entropy": {"weight": 0.3}}


@loop("num_positions", [13, 1])
@loop("settings", SETTINGS.values(), ids=SETTINGS)
def test_value_and_gradients_equal_the_oracle(settings, num_positions):
    case = make_case(num_positions, masked=num_positions > 1)
    objective, states = built(config_of(settings, **CE)), states_for(case)
    assert case.rows.num_positions == 1 or not case.rows.loss_mask_P.all()
    found, expected = loss_of(objective, case, states), oracle_loss(objective, case, states, 7.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    leaves = leaves_of(objective, case, states)
    for mine, plain in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-10)


@loop("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradcheck(settings):
    case = make_case(4, masked=False)
    objective, states = built(config_of(settings)), states_for(case)
    parameters = list(objective.terms.parameters())

    def loss(*leaves: Tensor) -> Tensor:
        student = dict(enumerate(leaves[: len(WIDTHS)]))
        return loss_of(objective, case, replace(states, student=student))

    assert torch.autograd.gradcheck(loss, [*states.student.values(), *parameters])


def test_sums_are_unweighted_and_stand_beside_those_of_the_losses():
    case = make_case()
    objective, states = built(config_of(SETTINGS["both"], weight=0.25, **CE)), states_for(case)
    output = objective(case.hidden_PD, case.head, case.rows, 1000, states)
    assert list(output.sums) == ["cross_entropy", "hidden_mse", "hidden_cosine"]
    rows = case.rows.loss_mask_P.nonzero().squeeze(1).tolist()
    for name in objective.terms:
        assert not output.sums[name].requires_grad
        expected = sum(oracle(objective, states, name, row) for row in rows)
        torch.testing.assert_close(output.sums[name], expected.detach())


def test_schedules_and_selection_work_as_for_losses():
    case = make_case(masked=False)
    ramp = {"schedule": "linear", "start": 0.0, "end": 2.0}
    threshold = float(case.rows.entropy_P.median())
    config = config_of({"hidden_mse": {"select": {"by": "teacher_entropy", "min": threshold}}}, ramp, **CE)
    objective, states = built(config), states_for(case)
    chosen = (case.rows.entropy_P >= threshold).nonzero().squeeze(1).tolist()
    assert 0 < len(chosen) < case.rows.num_positions
    expected = sum(oracle(objective, states, "hidden_mse", row) for row in chosen)
    for progress, weight in ((0.0, 0.0), (0.25, 0.5), (1.0, 2.0)):
        objective.progress = progress
        output = objective(case.hidden_PD, case.head, case.rows, 7, states)
        torch.testing.assert_close(output.sums["hidden_mse"], expected.detach())
        assert int(output.sums["hidden_mse_selected"]) == len(chosen)
        alone = dense_loss(case, replace_terms(config), 7) + weight * expected / 7
        torch.testing.assert_close(output.loss, alone)


# ------------------------------------------------------------------------------------------------------ identities


@loop("settings", [SETTINGS[name] for name in ("mse", "mse none", "cosine")])
def test_a_student_that_is_the_teacher_has_loss_zero(settings):
    case = make_case()
    objective = built(config_of(settings), widths=(6,) * 5)
    given = states_for(case).teacher
    output = objective(case.hidden_PD, case.head, case.rows, 1, LayerStates(given, given))
    assert float(output.loss.detach()) == pytest.approx(0, abs=1e-6)
    assert set(objective.needs.student_layers) == set(CONTEXT.layer_widths)


def test_a_sink_does_not_outweigh_the_other_positions():
    case = make_case(masked=False)
    states = states_for(case)
    far = replace(states, teacher={layer: state.clone() for layer, state in states.teacher.items()})
    for state in far.teacher.values():
        state[0] *= 10_000
    for normalise, changes in (("teacher", False), ("none", True)):
        objective = built(config_of({"hidden_mse": {"layers": {2: 2}, "normalise": normalise}}))
        before, after = (loss_of(objective, case, given).item() for given in (states, far))
        assert (after > 10 * before) is changes, normalise


def test_states_of_zeros_have_a_finite_loss_and_gradient():
    case = make_case(masked=False)
    states = states_for(case)
    for zeros in (states.student[2], states.teacher[2]):
        with torch.no_grad():
            zeros[:3] = 0
    for name in HIDDEN_TERMS:
        objective = built(config_of({name: {}}))
        loss = loss_of(objective, case, states)
        assert math.isfinite(loss.detach())
        assert all(grad.isfinite().all() for grad in gradients(loss, leaves_of(objective, case, states)))


@loop("name", HIDDEN_TERMS)
def test_a_learned_map_finds_the_teacher_of_a_linear_world(name):
    random = torch.Generator().manual_seed(0)
    case = make_case(64, masked=False)
    student_PD = torch.randn(64, 3, generator=random, dtype=torch.float64)
    teacher_PD = student_PD @ torch.randn(3, 6, generator=random, dtype=torch.float64)
    objective = built(config_of({name: {"layers": {0: 2}}}, weight=1.0))
    states = LayerStates({0: student_PD}, {2: teacher_PD})
    optimiser = torch.optim.Adam(objective.terms.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        optimiser.zero_grad()
        loss = loss_of(objective, case, states, num_valid=64)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.1
    assert losses[-1] < 1e-3


# ------------------------------------------------------------------------------- nothing to learn from, and splits


@loop("num_positions", [0, 1, 6])
@loop("settings", SETTINGS.values(), ids=SETTINGS)
def test_without_valid_positions_everything_takes_part_with_gradient_zero(settings, num_positions):
    case = make_case(num_positions)
    case = replace(case, rows=replace(case.rows, loss_mask_P=torch.zeros(num_positions, dtype=torch.bool)))
    objective, states = built(config_of(settings)), states_for(case)
    output = objective(case.hidden_PD, case.head, case.rows, 0, states)
    assert float(output.loss.detach()) == 0
    output.loss.backward()
    taking_part = [*case.leaves(), *objective.terms.parameters()]
    assert all(leaf.grad is not None and leaf.grad.abs().sum() == 0 for leaf in taking_part)


@loop("settings", SETTINGS.values(), ids=SETTINGS)
def test_masked_positions_may_hold_garbage(settings):
    case = make_case()
    objective, states = built(config_of(settings)), states_for(case)
    leaves = leaves_of(objective, case, states)
    expected = gradients(loss_of(objective, case, states), leaves)
    mask_P1 = case.rows.loss_mask_P[:, None]
    spoilt = LayerStates(
        {layer: torch.where(mask_P1, state, torch.nan) for layer, state in states.student.items()},
        {layer: torch.where(mask_P1, state, torch.inf) for layer, state in states.teacher.items()},
    )
    for mine, plain in zip(gradients(loss_of(objective, case, spoilt), leaves), expected, strict=True):
        torch.testing.assert_close(mine, plain)


@loop("settings", SETTINGS.values(), ids=SETTINGS)
def test_splitting_and_shuffling_do_not_change_the_gradient(settings):
    case = make_case()
    objective, states = built(config_of(settings, **CE)), states_for(case)
    leaves = leaves_of(objective, case, states)
    expected = gradients(loss_of(objective, case, states, 9), leaves)
    every = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    for parts in (every.split(4), every.split(1), every.tensor_split([0, 2, 13])):
        total = sum(
            loss_of(
                objective,
                replace(case, hidden_PD=case.hidden_PD[part], rows=case.rows.select(part)),
                states.select(part),
                9,
            )
            for part in parts
        )
        for mine, plain in zip(gradients(total, leaves), expected, strict=True):
            torch.testing.assert_close(mine, plain)


def test_weight_zero_is_measured_and_takes_part_but_trains_nothing():
    case = make_case()
    objective, states = built(config_of({"hidden_mse": {"projection": "linear"}}, 0.0, **CE)), states_for(case)
    output = objective(case.hidden_PD, case.head, case.rows, 7, states)
    assert float(output.sums["hidden_mse"]) > 0
    torch.testing.assert_close(output.loss, dense_loss(case, replace_terms(objective.config), 7))
    output.loss.backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in objective.terms.parameters())
    assert all(state.grad is None for state in states.student.values())


def test_losses_of_weight_zero_beside_a_term_are_measured():
    case = make_case()
    config = config_of({"hidden_mse": {}}, cross_entropy={"weight": 0.0})
    output = built(config)(case.hidden_PD, case.head, case.rows, 7, states_for(case))
    assert float(output.sums["cross_entropy"]) > 0
    output.loss.backward()
    assert case.head.weight_VD.grad.abs().sum() == 0


@loop("name", HIDDEN_TERMS)
def test_bfloat16_students_and_autocast_are_reduced_in_float32(name):
    case = make_case(dtype=torch.float32)
    exact = states_for(case, dtype=torch.bfloat16)
    objective = built(config_of({name: {}}, weight=1.0))
    expected = loss_of(objective, case, replace(exact, student={n: s.double() for n, s in exact.student.items()}))
    objective.terms.float()
    assert all(parameter.dtype == torch.float32 for parameter in objective.terms.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(objective, case, exact)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.backward()
    assert exact.student[1].grad.dtype == torch.bfloat16


def test_without_grad_nothing_is_differentiated():
    case = make_case()
    objective, states = built(config_of(SETTINGS["both"], **CE)), states_for(case)
    with torch.no_grad():
        found = loss_of(objective, case, states)
    assert not found.requires_grad
    torch.testing.assert_close(found, loss_of(objective, case, states).detach())


# -------------------------------------------------------------------------------------- how modules are made


def test_maps_are_orthogonal_and_only_where_widths_differ():
    objective = built(config_of({"hidden_mse": {}}))
    module = objective.terms["hidden_mse"]
    assert module.pairs == {0: 0, 1: 2, 2: 4}
    assert set(module.maps) == {"0", "1"}
    for layer, width in ((0, 3), (1, 5)):
        weight = module.maps[str(layer)].weight
        assert weight.shape == (6, width)
        # To float32, in which the matrix was made.
        torch.testing.assert_close(weight.T @ weight, torch.eye(width, dtype=torch.float64), atol=1e-5, rtol=0)
    assert module.describe() == {"layers": {"0": 0, "1": 2, "2": 4}, "projections": [0, 1]}
    everywhere = built(config_of({"hidden_mse": {"projection": "linear"}})).terms["hidden_mse"].maps
    assert torch.equal(everywhere["2"].weight, torch.eye(6, dtype=torch.float64)), "starts as if there were none"


def test_maps_depend_on_the_seed_and_on_nothing_else():
    def weights(seed: int) -> Tensor:
        objective = Objective(config_of({"hidden_cosine": {}}), context=CONTEXT)
        objective.build_terms(WIDTHS, seed)
        return torch.cat([parameter.flatten() for parameter in objective.terms.parameters()])

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.random.get_rng_state(), before), "the run's own random numbers are left alone"
    torch.rand(3)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


@loop(
    ("stored", "num_teacher_layers", "num_student_layers", "pairs"),
    [
        ([0, 10, 20, 30], 30, 3, {0: 0, 1: 10, 2: 20, 3: 30}),
        ([30], 30, 6, {6: 30}),
        ([12, 30], 30, 10, {4: 12, 10: 30}),
        ([1, 2], 2, 12, {6: 1, 12: 2}),
        # Of several teacher layers at one student layer, the deepest.
        ([14, 15, 16], 30, 2, {1: 16}),
    ],
)
def test_default_pairs_are_at_the_same_relative_depth(stored, num_teacher_layers, num_student_layers, pairs):
    context = TeacherContext(num_layers=num_teacher_layers, layer_widths=dict.fromkeys(stored, 6))
    assert HiddenMSE(weight=1.0).pairs(context, num_student_layers) == pairs


def test_needs_are_what_the_pairs_name():
    objective = built(config_of({"hidden_mse": {"layers": {1: 2}}, "hidden_cosine": {"layers": {-1: 4, 1: 0}}}))
    assert objective.needs.student_layers == {1, 2}
    assert objective.needs.teacher_fields == ("hidden-0", "hidden-2", "hidden-4")
    assert Objective().needs.student_layers == frozenset()


# --------------------------------------------------------------------------------------------------- mistakes


@loop(
    ("settings", "context", "words"),
    [
        ({}, TeacherContext(num_layers=4), "the cache stores none; dump with --hidden-states"),
        ({"layers": {1: 3}}, CONTEXT, r"of layer 3, and the cache stores those of layer 0, 2, 4 of 0 .* to 4 \(last\)"),
        ({"layers": {1: -2, 2: 9}}, CONTEXT, "of layer 3, 9, and the cache stores"),
    ],
)
@loop("name", HIDDEN_TERMS)
def test_layers_that_the_cache_does_not_store_are_refused_before_a_student_is_loaded(name, settings, context, words):
    with pytest.raises(ConfigError, match=f"{name}: it needs the teacher's hidden states.*{words}"):
        Objective(config_of({name: settings}), context=context)


@loop(
    ("settings", "words"),
    [
        ({"layers": {3: 2}}, r"the student has no layer 3; it has 0 \(embeddings\) to 2 \(last\)"),
        ({"layers": {-4: 2}}, "the student has no layer -4"),
        ({"layers": {2: 2, "last": 4}}, "layers has layer 2 of the student twice"),
        ({"projection": "none"}, "projection none needs equal widths, but layer 0 of the student is 3 wide and .* 6;"),
    ],
)
@loop("name", HIDDEN_TERMS)
def test_what_does_not_fit_the_student_is_refused(name, settings, words):
    with pytest.raises(ConfigError, match=f"{name}: .*{words}"):
        built(config_of({name: settings}))


@loop(
    ("settings", "words"),
    [
        ({"layer": {1: 2}}, "unknown setting 'hidden_mse.layer'; did you mean 'layers'"),
        ({"layers": {}}, "hidden_mse.layers"),
        ({"layers": {"first": 2}}, "hidden_mse.layers"),
        ({"projection": "mlp"}, "hidden_mse.projection"),
        ({"normalise": "layer"}, "hidden_mse.normalise"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ConfigError, match=words):
        config_of({"hidden_mse": settings})


def test_a_term_needs_a_weight_and_may_be_all_there_is():
    with pytest.raises(ConfigError, match=r"hidden_mse\.weight' is required"):
        build(ObjectiveConfig, {"hidden_mse": {"layers": {1: 2}}})
    with pytest.raises(ConfigError, match=r"at least one of .*hidden_mse, hidden_cosine, .* needs a weight above 0"):
        config_of({"hidden_mse": {}}, weight=0.0)
    assert config_of({"hidden_mse": {}}).losses == {}


def test_states_that_are_missing_or_of_other_positions_are_refused():
    case = make_case()
    objective, states = built(config_of({"hidden_mse": {}})), states_for(case)
    with pytest.raises(ConfigError, match=r"hidden_mse: call build_terms .* give the states"):
        objective(case.hidden_PD, case.head, case.rows, 7)
    with pytest.raises(ConfigError, match="hidden_mse: call build_terms"):
        loss_of(Objective(config_of({"hidden_mse": {}}), context=CONTEXT), case, states)
    with pytest.raises(StudentError, match="layer 0 of the student has 12 states for 13 positions of the teacher"):
        loss_of(objective, case, states.select(torch.arange(12)))
    with pytest.raises(ConfigError, match="needs hidden-2, hidden-4 in every training batch, found hidden-0"):
        LayerStates.from_batch({}, {"hidden-0": case.hidden_PD}, objective.needs)


def test_settings_survive_the_record_of_a_run():
    config = config_of({"hidden_mse": {"layers": {1: 2, "last": -1}}})
    assert build(ObjectiveConfig, json.loads(json.dumps(config.model_dump(mode="json")))) == config
