"""The page about objectives: every example is one, and its tables are those of the code."""

from __future__ import annotations

import pytest
import torch
import yaml

from kdcache.config import Config, build
from kdcache.losses import MEASURES, SCHEDULES, TERMS, Objective, ObjectiveConfig, TeacherContext
from kdcache.losses.from_cache import SAMPLE_POSITIONS
from kdcache.losses.schedules import Schedule
from tests.docs.pages import DOCS, blocks, rows, sections

PAGE = (DOCS / "objective.md").read_text()
EXAMPLES = blocks(PAGE, "yaml")


class Settings(Config):
    objective: ObjectiveConfig


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_are_objectives_of_a_top_k_cache(example: str) -> None:
    config = build(Settings, yaml.safe_load(example)).objective
    context = TeacherContext(num_layers=12, layer_widths={4: 16, 8: 16, 12: 16})
    objective = Objective(config.resolve(dict.fromkeys(config.shares, torch.arange(10.0))), context=context)
    objective.build_terms(student_widths=(8,) * 7, seed=0)


def test_there_are_examples_of_everything() -> None:
    assert len(EXAMPLES) == 6
    assert any("select" in example and "schedule" in example for example in EXAMPLES)


def test_code_of_the_page_runs() -> None:
    (code,) = blocks(PAGE, "python")
    exec(compile(code, "docs/objective.md", "exec"), {"__name__": __name__})


def test_table_of_schedules_is_that_of_the_code() -> None:
    listed = rows(sections(PAGE)["Schedules"])
    assert list(listed) == list(SCHEDULES)
    for name, (settings, _) in listed.items():
        fields = {
            field: info for field, info in SCHEDULES[name].model_fields.items() if field not in Schedule.model_fields
        }
        written = [
            f"`{field}`" if info.is_required() else f"`{field}` ({info.default:g})" for field, info in fields.items()
        ]
        assert settings.replace(";", ",") == ", ".join(written)


def test_table_of_terms_is_that_of_the_code() -> None:
    shown = {**rows(sections(PAGE)["Terms over hidden states"]), **rows(sections(PAGE)["Terms over raw outputs"])}
    assert list(shown) == list(TERMS)


def test_table_of_measures_is_that_of_the_code() -> None:
    assert list(rows(sections(PAGE)["Selection"])) == list(MEASURES)
    assert f"{SAMPLE_POSITIONS:,}" in PAGE
