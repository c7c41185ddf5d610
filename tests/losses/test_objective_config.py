from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from kdcache.config import Config, load
from kdcache.errors import ConfigError
from kdcache.losses import LOSSES, TERMS, CrossEntropy, ForwardKL, ObjectiveConfig, TeacherRows
from kdcache.losses.hidden import HiddenMSE
from tests.loops import loop


class Settings(Config):
    objective: ObjectiveConfig = ObjectiveConfig()


def objective(*assignments: str) -> dict:
    return load(Settings, assignments=[f"objective.{item}" for item in assignments]).objective.model_dump()


def test_one_field_per_row_of_the_table():
    assert list(ObjectiveConfig.model_fields) == [*LOSSES, *TERMS]
    assert len(LOSSES) >= 2


@loop(
    ("assignments", "expected"),
    [
        ([], {"forward_kl": (0.9, 1.0, None, "bucket"), "cross_entropy": (0.1,)}),
        (["forward_kl.temperature=2"], {"forward_kl": (0.9, 2.0, None, "bucket"), "cross_entropy": (0.1,)}),
        (["forward_kl.weight=1"], {"forward_kl": (1.0, 1.0, None, "bucket"), "cross_entropy": None}),
        (["forward_kl.tail=prior"], {"forward_kl": (0.9, 1.0, None, "prior"), "cross_entropy": (0.1,)}),
        (["forward_kl.mode=full"], {"forward_kl": (0.9, 1.0, "full", "bucket"), "cross_entropy": (0.1,)}),
        (["cross_entropy.weight=1"], {"forward_kl": None, "cross_entropy": (1.0,)}),
        (["cross_entropy=null"], {"forward_kl": (0.9, 1.0, None, "bucket"), "cross_entropy": None}),
        (
            ["forward_kl.weight=0", "cross_entropy.weight=2"],
            {"forward_kl": (0.0, 1.0, None, "bucket"), "cross_entropy": (2.0,)},
        ),
    ],
)
def test_weights_are_given_all_or_not_at_all(assignments, expected):
    found = objective(*assignments)
    assert all(loss is None or loss.pop("select") is None for loss in found.values())
    found = {name: loss and tuple(loss.values()) for name, loss in found.items()}
    assert {name: found[name] for name in expected} == expected


@pytest.fixture
def plugins(monkeypatch):
    """Packages with a loss, a term and a loss that cannot be imported are installed."""
    monkeypatch.setitem(LOSSES._plugins, "mine", [EntryPoint("mine", f"{__name__}:Mine", LOSSES.group)])
    monkeypatch.setitem(LOSSES._plugins, "worse", [EntryPoint("worse", "no_such_module:Loss", LOSSES.group)])
    monkeypatch.setitem(TERMS._plugins, "other", [EntryPoint("other", f"{__name__}:Other", TERMS.group)])
    yield
    for table, name in ((LOSSES, "mine"), (TERMS, "other")):
        table._used.pop(name, None)


class Mine(CrossEntropy):
    scale: float = 1.0


class Other(HiddenMSE):
    pass


@pytest.mark.usefixtures("plugins")
def test_losses_and_terms_of_other_packages_are_settings_like_any_other():
    config = load(Settings, assignments=["objective.mine.weight=2", "objective.other.weight=1"]).objective
    assert config.parts == {"mine": Mine(weight=2), "other": Other(weight=1)}
    assert list(config.losses) == ["mine"]
    assert list(config.terms) == ["other"]
    assert ObjectiveConfig.model_validate(config.model_dump()) == config
    assert list(ObjectiveConfig.setting_names()) == [*LOSSES, *TERMS]
    assert ObjectiveConfig(forward_kl=ForwardKL(weight=1), mine=Mine(weight=1)).parts.keys() == {"forward_kl", "mine"}
    with pytest.raises(ConfigError, match=r"unknown setting 'objective\.mine\.scal'; did you mean 'scale'"):
        objective("mine.weight=1", "mine.scal=3")
    with pytest.raises(ConfigError, match=r"unknown setting 'objective\.mien'; did you mean 'mine'"):
        objective("mien.weight=1")


@pytest.mark.usefixtures("plugins")
def test_a_loss_that_cannot_be_imported_hinders_those_who_name_it_only():
    assert objective("forward_kl.weight=1")["forward_kl"]["weight"] == 1
    with pytest.raises(ConfigError, match=r"the loss 'worse' of .* cannot be imported from no_such_module:Loss"):
        objective("worse.weight=1")


def test_all_problems_of_an_objective_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        objective("forward_kl.temprature=2", "forward_kl.weight=-1", "ranking.top_k=1")
    message = str(caught.value)
    for part in ("'objective.forward_kl.temprature'", "'objective.forward_kl.weight'"):
        assert part in message
    assert "'objective.ranking.top_k'" in message


def test_all_unknown_losses_are_told_at_once_before_any_is_imported():
    with pytest.raises(ConfigError, match=r"'objective\.foward_kl'; did you mean .*'objective\.rankin'; did you mean"):
        objective("foward_kl.weight=1", "rankin.weight=1", "forward_kl.weight=-1")


def test_settings_cost_no_torch():
    code = "import sys, kdcache.losses as l; l.ObjectiveConfig, l.LOSSES, l.TERMS; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_what_is_written_into_a_record_reads_back_the_same():
    config = ObjectiveConfig.model_validate({"cross_entropy": {"weight": 0.5}})
    assert ObjectiveConfig.model_validate(config.model_dump()) == config


@loop(
    ("assignments", "message"),
    [
        (["forward_kl.temprature=2"], "unknown setting 'objective.forward_kl.temprature'; did you mean 'temperature'"),
        (["foward_kl.weight=1"], "unknown setting 'objective.foward_kl'; did you mean 'forward_kl'"),
        (["forward_kl.weight=-1"], "'objective.forward_kl.weight': .* greater than or equal to 0 .found -1"),
        (["forward_kl.weight=.nan"], "'objective.forward_kl.weight'"),
        (["forward_kl.temperature=0"], "'objective.forward_kl.temperature': .* greater than 0 .found 0"),
        (["forward_kl.weight=much"], "'objective.forward_kl.weight': .*valid number.* .found 'much'"),
        (["forward_kl=3"], "'objective.forward_kl'"),
        (["forward_kl.tail=ghost"], "'objective.forward_kl.tail': .*'bucket', 'prior'.* .found 'ghost'"),
        (["forward_kl.mode=exact"], "'objective.forward_kl.mode': .*'decoupled', 'grid' or 'full' .found 'exact'"),
        (["forward_kl.weight=0"], "at least one of forward_kl, cross_entropy.* needs a weight above 0"),
        (["forward_kl=null", "cross_entropy=null"], "needs a weight above 0"),
        (["forward_kl.temperature=2", "cross_entropy.weight=1"], "'objective.forward_kl.weight' is required"),
    ],
)
def test_wrong_settings_give_readable_errors(assignments, message):
    with pytest.raises(ConfigError, match=message):
        objective(*assignments)


def test_a_batch_without_the_teachers_rows_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"teacher_log_tail, .* not found among teacher_ids.*remove_unused_columns"):
        TeacherRows.from_batch({"teacher_ids": torch.zeros(1, 1)})
