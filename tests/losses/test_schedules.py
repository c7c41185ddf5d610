from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kdcache.config import Config, build, load
from kdcache.errors import ConfigError
from kdcache.losses import (
    SCHEDULES,
    ForwardKL,
    Objective,
    ObjectiveConfig,
    TeacherContext,
    incompatibility,
    score_positions,
)
from kdcache.losses.schedules import Schedule
from tests.loops import loop
from tests.losses.oracle import Case, dense_loss, dense_values, make_case


class Settings(Config):
    objective: ObjectiveConfig = ObjectiveConfig()


def objective(*assignments: str) -> ObjectiveConfig:
    return load(Settings, assignments=[f"objective.{item}" for item in assignments]).objective


def schedule(**settings: Any) -> Schedule:
    return SCHEDULES[settings["schedule"]].model_validate(settings)


LINEAR = {"schedule": "linear", "start": 0.9, "end": 0.1}
LATE = {"schedule": "linear", "start": 2.0, "end": 4.0, "begin": 0.25, "until": 0.75}
COSINE = {"schedule": "cosine", "start": 0.0, "end": 1.0}
WSD = {"schedule": "wsd", "start": 0.1, "peak": 0.9, "end": 0.3, "warmup": 0.2, "decay": 0.4}
CONSTANT = {"schedule": "constant", "value": 0.7}
SHORT = {"schedule": "wsd", "start": 0.0, "peak": 1.0, "end": 0.0, "warmup": 0.0, "decay": 0.0}


# ------------------------------------------------------------------------------------------------ the courses


@loop(
    ("settings", "course"),
    [
        (LINEAR, {0: 0.9, 0.25: 0.7, 0.5: 0.5, 1: 0.1}),
        (LATE, {0: 2.0, 0.25: 2.0, 0.5: 3.0, 0.75: 4.0, 1: 4.0}),
        (COSINE, {0: 0.0, 0.25: (1 - math.sqrt(0.5)) / 2, 0.5: 0.5, 0.75: (1 + math.sqrt(0.5)) / 2, 1: 1.0}),
        (WSD, {0: 0.1, 0.1: 0.5, 0.2: 0.9, 0.5: 0.9, 0.6: 0.9, 0.8: 0.6, 1: 0.3}),
        (SHORT, {0: 1.0, 0.5: 1.0, 1: 1.0}),
        (CONSTANT, {0: 0.7, 0.3: 0.7, 1: 0.7}),
    ],
    ids=lambda value: value.get("schedule"),
)
def test_courses(settings, course):
    found = {progress: schedule(**settings).at(progress) for progress in course}
    assert found == pytest.approx(course, abs=1e-12)


@loop("settings", [LINEAR, LATE, COSINE, WSD, CONSTANT, SHORT], ids=lambda s: s["schedule"])
def test_a_schedule_starts_and_ends_exactly_and_never_leaves_the_range_of_its_values(settings):
    made = schedule(**settings)
    levels = [getattr(made, name) for name in made.value_fields]
    values = [made.at(progress) for progress in np.linspace(0, 1, 101)]
    assert all(min(levels) <= value <= max(levels) for value in values)
    if settings is not SHORT:
        assert (values[0], values[-1]) == (levels[0], levels[-1])
    corners = [0.0, *made.knots(), 1.0]
    for a, b in itertools.pairwise(corners):  # between two corners it goes one way only
        steps = np.diff([made.at(progress) for progress in np.linspace(a, b, 20)])
        assert (steps >= -1e-15).all() or (steps <= 1e-15).all()


def test_every_schedule_of_the_table_is_tested():
    assert {settings["schedule"] for settings in (LINEAR, COSINE, WSD, CONSTANT)} == set(SCHEDULES)
    assert all(kind.model_fields["schedule"].default == name for name, kind in SCHEDULES.items())


# ------------------------------------------------------------------------------------------------ the settings


def test_a_constant_schedule_is_a_number():
    assert objective("forward_kl.weight.schedule=constant", "forward_kl.weight.value=0.7") == objective(
        "forward_kl.weight=0.7"
    )


def test_settings_lay_schedules_over_numbers_and_numbers_over_schedules(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(
        "objective: {forward_kl: {weight: 0.5}, cross_entropy: {weight: {schedule: cosine, start: 0, end: 1}}}"
    )

    def loaded(*assignments: str) -> ObjectiveConfig:
        return load(Settings, file=file, assignments=assignments).objective

    prefix = "objective.forward_kl.weight"
    found = loaded(f"{prefix}.schedule=linear", f"{prefix}.start=0.9", f"{prefix}.end=0.1")
    assert found.forward_kl.weight == schedule(**LINEAR)
    assert loaded("objective.cross_entropy.weight=0.25").cross_entropy.weight == 0.25
    assert loaded("objective.cross_entropy.weight.end=0.5").cross_entropy.weight == schedule(**COSINE | {"end": 0.5})


@loop("mode", ["python", "json"])
def test_what_is_written_into_a_record_reads_back_the_same(mode):
    config = build(
        ObjectiveConfig,
        {"forward_kl": {"weight": WSD, "temperature": LATE}, "cross_entropy": {"weight": COSINE}},
    )
    text = yaml.safe_dump(config.model_dump(mode=mode))
    assert build(ObjectiveConfig, yaml.safe_load(text)) == config
    assert build(ObjectiveConfig, config.model_dump() | {"cross_entropy": {"weight": LINEAR}}) != config


W = "forward_kl.weight"
T = "forward_kl.temperature"


@loop(
    ("assignments", "message"),
    [
        (
            [f"{W}.schedule=linaer", f"{W}.start=1"],
            r"weight.schedule': unknown schedule '.*'; did you mean 'linear'",
        ),
        (
            [f"{W}.schedule=[1]"],
            r"weight.schedule': unknown schedule '.*'; known: constant, cosine, linear, wsd",
        ),
        ([f"{W}.start=1"], "weight.schedule': a schedule needs its name; known: constant, "),
        (
            [f"{W}.schedule=linear", f"{W}.strat=1"],
            "weight.strat': unknown setting of linear 'strat'; did you mean 'start'",
        ),
        ([f"{W}.schedule=linear", f"{W}.start=1"], r"objective.forward_kl.weight.end' is required$"),
        ([f"{W}={{schedule: linear, start: 1, end: -0.5}}"], r"weight.end': .*greater than or equal to 0 .found -0.5"),
        (
            [f"{W}={{schedule: wsd, start: 0, peak: -1, end: 0}}"],
            r"weight.peak': .*greater than or equal to 0 .found -1",
        ),
        ([f"{W}={{schedule: cosine, start: .inf, end: 0}}"], r"weight.start': .*finite"),
        ([f"{W}={{schedule: linear, start: much, end: 0}}"], r"weight.start': .*valid number.*found 'much'"),
        (
            [f"{W}={{schedule: linear, start: 1, end: 0, begin: 0.5, until: 0.5}}"],
            "weight': begin must be less than un",
        ),
        ([f"{W}={{schedule: linear, start: 1, end: 0, until: 2}}"], r"weight.until': .*less than or equal to 1"),
        ([f"{W}={{schedule: wsd, start: 0, peak: 1, end: 0, warmup: 0.6, decay: 0.6}}"], r"warmup \+ decay must be at"),
        ([f"{T}={{schedule: cosine, start: 4, end: 0}}"], r"temperature.end': .*greater than 0 .found 0"),
        ([f"{T}={{schedule: constant, value: 0}}"], r"temperature.value': .*greater than 0 .found 0"),
        ([f"{W}={{schedule: linear, start: 0, end: 0}}"], "needs a weight above 0 at some time"),
    ],
)
def test_wrong_settings_give_one_readable_line(assignments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        objective(*assignments)
    assert "\n" not in str(caught.value)
    hints = ("; did you mean", "; known:")
    assert ";" not in re.sub("|".join(hints), "", str(caught.value)), "one problem only"


def test_a_weight_of_0_at_the_start_is_enough():
    assert objective(f"{W}={{schedule: linear, start: 0, end: 1}}").forward_kl.at(0.5).weight == 0.5


# ------------------------------------------------------------------------------------------------ over a run


SCHEDULED = build(
    ObjectiveConfig,
    {"forward_kl": {"weight": LINEAR, "temperature": LATE}, "cross_entropy": {"weight": COSINE}},
)


def numbers(weight: float, temperature: float, cross_entropy: float) -> ObjectiveConfig:
    return build(
        ObjectiveConfig,
        {"forward_kl": {"weight": weight, "temperature": temperature}, "cross_entropy": {"weight": cross_entropy}},
    )


def output_at(case: Case, config: ObjectiveConfig, progress: float) -> Any:
    objective = Objective(config, chunk_positions=4, context=case.context_for(config))
    objective.progress = progress
    return objective(case.hidden_PD, case.head, case.rows, 7.0)


@loop(("progress", "values"), [(0.0, (0.9, 2.0, 0.0)), (0.5, (0.5, 3.0, 0.5)), (1.0, (0.1, 4.0, 1.0))])
def test_at_any_moment_the_gradient_is_that_of_the_numbers(progress, values):
    case = make_case()
    found = torch.autograd.grad(output_at(case, SCHEDULED, progress).loss, case.leaves())
    expected = torch.autograd.grad(dense_loss(case, numbers(*values), 7.0), case.leaves())
    for mine, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)


def test_what_changes_is_told_and_numbers_are_not():
    objective = Objective(build(ObjectiveConfig, {"forward_kl": {"weight": 1, "temperature": LATE}}))
    assert objective.scheduled == {"forward_kl_temperature": 2.0}
    objective.progress = 0.5
    assert objective.scheduled == {"forward_kl_temperature": 3.0}
    assert Objective().scheduled == {}


def test_while_all_weights_are_0_loss_and_gradients_are_0_and_terms_are_measured():
    case = make_case()
    late = {"schedule": "linear", "start": 0, "end": 1, "begin": 0.5}
    config = build(ObjectiveConfig, {"forward_kl": {"weight": late}, "cross_entropy": {"weight": late}})
    output = output_at(case, config, 0.25)
    assert float(output.loss.detach()) == 0
    assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(output.loss, case.leaves()))
    for name, loss in config.losses.items():
        expected = dense_values(case, loss.at(0.25))[case.rows.loss_mask_P].sum()
        torch.testing.assert_close(output.sums[name], expected.detach())


def test_losses_are_scored_as_at_the_end_of_a_run():
    case = make_case()
    found = score_positions(case.hidden_PD, case.head, case.rows, SCHEDULED.losses).losses["forward_kl"]
    torch.testing.assert_close(found, dense_values(case, ForwardKL(weight=1.0, temperature=4.0)).detach())


GRID_CACHE = TeacherContext("top-k", 31, temperatures=(2.0,), prior_V=torch.full((31,), 1 / 31))


@loop(
    ("settings", "temperature", "refusal"),
    [
        ({"tail": "prior"}, {"schedule": "linear", "start": 1, "end": 1}, None),
        (
            {"tail": "prior"},
            {"schedule": "linear", "start": 1, "end": 2},
            "found temperature 1.25; .* at 25% of the run",
        ),
        ({"tail": "prior"}, {"schedule": "linear", "start": 2, "end": 1}, "found temperature 2; .* at 0% of the run"),
        # 1 at both ends, and for most of the time.
        ({"tail": "prior"}, {"schedule": "wsd", "start": 1, "peak": 2, "end": 1}, "temperature 1 only"),
        ({"tail": "prior"}, {"schedule": "cosine", "start": 1, "end": 2, "begin": 0.99}, "temperature 1 only"),
        ({"mode": "grid"}, {"schedule": "linear", "start": 1, "end": 2}, "mode grid needs .* at temperature 1.25"),
        ({"mode": "grid"}, {"schedule": "linear", "start": 2, "end": 2}, None),
        ({"mode": "decoupled"}, {"schedule": "linear", "start": 1, "end": 2}, None),
    ],
)
def test_a_temperature_has_to_make_sense_at_all_times(settings, temperature, refusal):
    config = build(ObjectiveConfig, {"forward_kl": {"weight": 1.0, "temperature": temperature, **settings}})
    if refusal is None:
        assert incompatibility(config.forward_kl, GRID_CACHE) is None
        Objective(config, context=GRID_CACHE)
    else:
        with pytest.raises(ConfigError, match=f"^forward_kl: .*{refusal}"):
            Objective(config, context=GRID_CACHE)
