"""The page about tasks: its table and settings are those of the code, and its commands run, for every task there is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcache.evaluate.results import ModelRow
from kdcache.tasks import TASKS, Task
from tests.cli.conftest import Run, run
from tests.docs.pages import DOCS, blocks, rows, sections
from tests.docs.test_readme import commands_in
from tests.task_models import TINY_TASKS

__all__ = ["run"]

PAGE = (DOCS / "tasks.md").read_text()
SECTIONS = sections(PAGE)
TABLE = rows(SECTIONS["Tasks"])
#: Columns of the table behind the name.
ROW, COLUMNS, STORED, MODEL, OBJECTIVE, SAYS = range(6)
#: What `evaluate` says of every model, whatever the task.
_FACTS = {"model", "num_parameters", "num_bytes", "tokens_per_s", "warnings", "entropy", "kept_mass", "metrics"}
_FACTS |= {"num_trained_on"}

each_task = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def section_of(task: Task) -> str:
    """The text of a task's section, its commands included."""
    return PAGE.split(f"\n## `{task.name}`\n")[1].split("\n## ")[0]


def test_every_task_has_a_row_and_a_section() -> None:
    assert set(TABLE) == set(TASKS)
    assert [title for title in SECTIONS if title.startswith("`")] == [f"`{name}`" for name in TABLE]


@each_task
def test_the_table_says_what_the_code_does(task: Task) -> None:
    cells = TABLE[task.name]
    columns = {name: f"(`{name}`)" not in cells[COLUMNS] for name in names_in(cells[COLUMNS])}
    assert columns == {role.name: role.is_required for role in task.roles}
    assert names_in(cells[MODEL]) == [task.model_class]
    terms = {name: float(weight) for weight, name in re.findall(r"([\d.]+) `(\w+)`", cells[OBJECTIVE])}
    assert terms == {name: settings["weight"] for name, settings in task.objective.items()}


@each_task
def test_settings_stand_with_their_defaults(task: Task) -> None:
    documented = {name: yaml.safe_load(cells[0].strip("`")) for name, cells in rows(section_of(task)).items()}
    assert documented == task.settings().model_dump(mode="json")


@pytest.fixture
def material(tmp_path: Path, teacher_dir: Path, corpus_file: Path, task: Task) -> Path:
    """A directory with what the page's commands name: models, and two corpora."""
    if task.name in TINY_TASKS:
        corpus = Path(TINY_TASKS[task.name].write(tmp_path)["corpus"])
    else:
        corpus = corpus_file
        for name in ("teacher", "student"):
            (tmp_path / name).symlink_to(teacher_dir)
    for name in ("train.jsonl", "held-out.jsonl"):
        shutil.copy(corpus, tmp_path / name)
    return tmp_path


@each_task
def test_the_commands_run_and_say_what_the_table_says(
    task: Task, material: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(material)
    [block] = blocks(section_of(task), "bash")
    calls = list(commands_in(block))
    assert [words[0] for words in calls] == ["dump-teacher", "dump-teacher", "train-student", "evaluate"]
    # The models of the tests read short texts, and know fewer ids than are kept as a rule.
    fewer = ["--top-k", 8] if task.gives == "tokens" else []
    more: dict[str, list[Any]] = {
        "dump-teacher": ["--device", "cpu", "--max-length", 32, *fewer],
        "train-student": ["--device", "cpu", "--max-steps", 2],
        "evaluate": ["--device", "cpu"],
    }
    for words in calls:
        outcome = run(*words, *more[words[0]], "--quiet", "--json")
        assert outcome.code == 0, outcome.err
    student = json.loads(outcome.out)["students"][0]
    said = {name for name in ModelRow.model_fields if student[name] is not None} - _FACTS | set(student["metrics"])
    assert said == set(names_in(TABLE[task.name][SAYS]))
