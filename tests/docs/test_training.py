"""The page about training runs: its tables are the settings that there are, with their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcache.cache.curriculum import PACINGS, Curriculum
from kdcache.cache.prefetch import THREADS
from kdcache.config import build
from kdcache.storage.local_store import LocalStoreConfig
from kdcache.students import StudentConfig
from kdcache.students.config import LoraConfig
from kdcache.students.sizes import SIZES
from kdcache.train import TrainConfig
from tests.docs.pages import DOCS, blocks, rows, sections

PAGE = (DOCS / "training.md").read_text()
SECTIONS = sections(PAGE)
BASE: dict[str, Any] = {"cache": "cache", "output": "run", "student": {"size": "nano"}}
# Defaults that depend on others are told in words.
IN_WORDS = {
    "local_store": "50 GB in `~/.cache/kdcache`",
    "objective": "0.9 forward KL + 0.1 cross-entropy",
    "learning_rate": "1e-3 for a fresh student, else 3e-4",
}


def said_default(name: str, default: Any) -> str:
    return IN_WORDS.get(name, "" if default is None else str(default).lower())


def test_settings_of_a_run_are_those_of_the_code() -> None:
    listed = rows(SECTIONS["Settings of a training run"])
    assert list(listed) == list(TrainConfig.model_fields)
    defaults = build(TrainConfig, BASE)
    for name, (said, _) in listed.items():
        default = 1 if name == "epochs" else None if name in BASE else getattr(defaults, name)
        assert said == said_default(name, default), name
    assert defaults.peak_learning_rate == 1e-3
    assert build(TrainConfig, BASE | {"student": {"model": "some"}}).peak_learning_rate == 3e-4


def test_settings_of_a_curriculum_are_those_of_the_code() -> None:
    listed = rows(SECTIONS["In which order"])
    fields, pacings = list(Curriculum.model_fields), list(PACINGS)
    assert list(listed) == fields + pacings
    assert [listed[name][0] for name in fields] == [str(value) for _, value in Curriculum()]


def test_settings_of_the_local_store_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {name: said for name, (said, _) in rows(SECTIONS["A cache that is elsewhere"]).items()}
    assert list(listed) == list(LocalStoreConfig.model_fields)
    stated = {"max_bytes": listed["max_bytes"], "num_processes": listed["num_processes"]}
    assert build(LocalStoreConfig, stated) == LocalStoreConfig()
    monkeypatch.delenv("KDCACHE_STORE")
    assert listed["directory"] == "`$KDCACHE_STORE`, else `~/.cache/kdcache`"
    assert LocalStoreConfig().path == Path("~/.cache/kdcache").expanduser()
    assert f"num_streams x shuffle_window + {THREADS}" in SECTIONS["A cache that is elsewhere"]


@pytest.mark.parametrize("example", blocks(PAGE, "yaml"))
def test_examples_are_settings_of_a_run(example: str) -> None:
    build(TrainConfig, BASE | yaml.safe_load(example))


def test_names_that_the_prose_relies_on_exist() -> None:
    student = SECTIONS["The student"]
    assert f"({', '.join(SIZES)})" in student
    assert [name for name in StudentConfig.model_fields if f"`{name}`" not in student] == []
    lora = yaml.safe_load(blocks(PAGE, "yaml")[0])["student"]["lora"]
    assert build(LoraConfig, lora) == LoraConfig()
    assert set(lora) == set(LoraConfig.model_fields)
    assert "## Per-sequence table" in (DOCS / "format.md").read_text()
