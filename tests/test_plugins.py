from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kdcache
from kdcache.cache.curriculum import PACINGS
from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS
from kdcache.errors import ConfigError
from kdcache.losses import LOSSES, TERMS
from kdcache.plugins import Table
from kdcache.tasks import TASKS

TABLES = {
    "kdcache.losses": LOSSES,
    "kdcache.terms": TERMS,
    "kdcache.tasks": TASKS,
    "kdcache.topk_codecs": TOPK_CODECS,
    "kdcache.vector_codecs": VECTOR_CODECS,
    "kdcache.curricula": PACINGS,
}
Install = Callable[..., None]


def entry(name: str, path: str, package: str = "toy") -> EntryPoint:
    point = EntryPoint(name, path, "toy.group")
    vars(point)["dist"] = SimpleNamespace(name=package)
    return point


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretend that packages with these entry points are installed."""

    def points(*found: EntryPoint) -> None:
        monkeypatch.setattr("kdcache.plugins.entry_points", lambda group: list(found))

    points()
    return points


def table(**rows: Any) -> Table[Any]:
    return Table("loss", "toy.group", rows)


def test_rows_are_imported_when_their_name_is_used(install: Install) -> None:
    found = table(a="kdcache.no_such_module:Thing", b="collections:OrderedDict", c=3)
    assert list(found) == ["a", "b", "c"]
    assert len(found) == 3
    assert found.names() == ("a", "b", "c")
    assert "a" in found
    assert "d" not in found
    assert found["b"].__name__ == "OrderedDict"
    assert found["c"] == 3
    with pytest.raises(ModuleNotFoundError):  # a wrong row of kdcache itself is a defect, and no mistake of the user's
        found["a"]


def test_plugins_come_last_and_are_imported_when_used(install: Install) -> None:
    install(entry("mine", "collections:Counter"), entry("worse", "no_such_module:Thing"))
    found = table(a=1)
    assert found.names() == ("a", "mine", "worse")
    assert found["mine"].__name__ == "Counter"
    assert found.get("mine").__name__ == "Counter"
    assert found.get("none", 5) == 5
    assert found.get("none") is None


def test_a_broken_plugin_breaks_itself_only(install: Install) -> None:
    install(entry("worse", "no_such_module:Thing"), entry("empty", "collections:NoSuchName"))
    found = table(a=1)
    assert found["a"] == 1
    assert "worse" in found
    with pytest.raises(
        ConfigError,
        match=r"loss 'worse' of the package 'toy' cannot be imported from no_such_module:Thing: ModuleNotFound.*repair",
    ):
        found["worse"]
    with pytest.raises(ConfigError, match=r"loss 'empty' of the package 'toy' cannot be imported.*AttributeError"):
        found.get("empty")
    assert found.importable() == {"a": 1}


def test_a_name_that_is_added_twice_is_reported_when_it_is_used(install: Install) -> None:
    install(entry("a", "collections:Counter"), entry("b", "m:x", "one"), entry("b", "m:y", "two"))
    found = table(a=1, c=3)
    assert found.names() == ("a", "c", "b")
    assert len(found) == 3
    assert found["c"] == 3
    with pytest.raises(ConfigError, match=r"loss 'a' is added by kdcache and the package 'toy'; uninstall or rename"):
        found["a"]
    with pytest.raises(ConfigError, match=r"loss 'b' is added by the package 'one' and the package 'two'"):
        found["b"]


def test_unknown_names_get_a_suggestion_without_an_import(install: Install) -> None:
    install(entry("hellinger", "no_such_module:Thing"))
    found = table(forward_kl="no.such:Module")
    for use in (found.check, found.__getitem__):
        with pytest.raises(ConfigError, match=r"^unknown loss 'helinger'; did you mean 'hellinger'\?$"):
            use("helinger")
    with pytest.raises(ConfigError, match=r"^unknown loss 'x'; known: forward_kl, hellinger$"):
        found.check("x")
    with pytest.raises(ValueError, match="unknown loss"):  # what validators may raise
        found.check("x")
    found.check("forward_kl")


def test_rows_are_made_once(install: Install) -> None:
    made: list[Any] = []

    def make(kind: Any) -> Any:
        made.append(kind)
        return kind()

    install(entry("mine", "collections:Counter"), entry("worse", "builtins:compile"))
    found: Table[Any] = Table("task", "toy.group", {"a": dict, "b": list}, make=make)
    assert found["a"] is found["a"]
    assert found["mine"] is found["mine"]
    assert made.count(dict) == 1
    assert len(made) == 2
    with pytest.raises(ConfigError, match=r"task 'worse' of the package 'toy' cannot be imported.*TypeError"):
        found["worse"]


def test_every_row_of_every_table_can_be_imported() -> None:
    for group, rows in TABLES.items():
        assert rows.group == group
        assert list(rows.importable()) == list(rows)
        assert len(rows) >= 4


@pytest.mark.parametrize("group", TABLES)
def test_a_broken_plugin_leaves_the_names_of_kdcache_alone(group: str, install: Install) -> None:
    install(entry("worse", "no_such_module:Thing"))
    rows = TABLES[group]
    again: Table[Any] = Table(rows.kind, rows.group, {name: rows[name] for name in rows})
    assert again[next(iter(rows))] is rows[next(iter(rows))]
    assert "worse" in again


def test_names_of_tasks_cost_no_import_of_the_tasks() -> None:
    code = "import sys; from kdcache.tasks import TASKS; list(TASKS); print('kdcache.tasks.ranking' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


_COMMANDS = """
import contextlib, io, sys
from kdcache.cli import main
from kdcache.cli import COMMANDS

def run(*arguments):
    sys.argv = ["kdcache", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code or 0, out.getvalue() + err.getvalue()

for command in COMMANDS:
    code, said = run(command, "--help")
    assert code == 0, (command, said)
code, said = run("dump-teacher", "--task", "worse", "--teacher", "t", "--corpus", "c", "--output", "o")
assert code == 1, (code, said)
print(said)
"""


def test_an_installed_package_that_cannot_be_imported_ends_no_command_that_does_without_it(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    groups = [*TABLES, "kdcache.teachers", "kdcache.fields"]
    (info / "entry_points.txt").write_text("".join(f"[{group}]\nworse = no_such_module:X\n" for group in groups))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(kdcache.__file__).parent.parent}"}
    found = subprocess.run([sys.executable, "-c", _COMMANDS], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    message = "the task 'worse' of the package 'broken' cannot be imported from no_such_module:X: ModuleNotFoundError"
    assert message in found.stdout
