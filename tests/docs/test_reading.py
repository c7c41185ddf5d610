"""The page about reading: its code runs, from top to bottom, on a cache; its tables and names are those of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import kdcache
from kdcache.cache.order import NUM_STREAMS
from tests.caches import KINDS, SOURCE
from tests.docs.pages import DOCS, blocks, sections

PAGE = (DOCS / "reading.md").read_text()


#: Caches of other tasks that the page's code takes for granted.
OTHER_TASKS = {"masked": "masked-lm", "classified": "sequence-classification", "ranked": "ranking"}


def test_code_of_the_page_runs(
    dumped: Path, task_caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cache").symlink_to(dumped)
    assert dumped.name == "cache"
    names: dict[str, Any] = {"__name__": __name__}
    names |= {name: kdcache.open_cache(str(task_caches[task])) for name, task in OTHER_TASKS.items()}
    for number, code in enumerate(blocks(PAGE, "python")):
        exec(compile(code, f"docs/reading.md, block {number}", "exec"), names)
    assert [item.suffix for item in Path("arrow").iterdir()] == [".arrow"]


def test_defaults_that_the_prose_says() -> None:
    defaults = {name: item.default for name, item in inspect.signature(kdcache.Cache.batches).parameters.items()}
    assert f"`num_streams` (default {NUM_STREAMS})" in PAGE
    assert defaults["num_streams"] == NUM_STREAMS
    assert f"`shuffle_window` shards (default {defaults['shuffle_window']})" in PAGE
    assert f"`threads={defaults['threads']}, ahead={defaults['ahead']}`" in PAGE


def test_columns_of_the_table_are_those_that_there_are(tmp_path: Path, task_caches: dict[str, Path]) -> None:
    found: set[str] = set()
    for number, source in enumerate([SOURCE, *KINDS.values()]):
        source.write(tmp_path / str(number))
    for path in (*tmp_path.iterdir(), *task_caches.values()):
        cache = kdcache.open_cache(str(path))
        columns = kdcache.to_arrow(cache, [0], fields=cache.manifest.vector_fields).column_names
        found |= set(columns) - set(cache.sequence_table().column_names)
    listed = sections(PAGE)["Tables"]
    said = {name for line in listed.splitlines() if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line)}
    assert {"hidden-<n>" if name.startswith("hidden-") else name for name in found} == said
