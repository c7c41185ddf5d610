"""The rules of the house that a machine can check; `make lint` checks layers, types and style."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import kdcache
from tests.loops import loop

ROOT = Path(__file__).parents[1]
MODULES = ["kdcache", *(module.name for module in pkgutil.walk_packages(kdcache.__path__, "kdcache."))]


def path_of(module: str) -> Path:
    base = ROOT.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def test_every_module_is_found():
    files = [path for path in (ROOT / "kdcache").rglob("*.py") if "__pycache__" not in path.parts]
    assert sorted(path_of(module) for module in MODULES) == sorted(files)
    assert len(MODULES) > 50


def test_a_new_module_has_a_layer():
    import tomllib

    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layered = {name.strip("() ") for layer in contract["layers"] for name in layer.split("|")}
    top = {module.split(".")[1] for module in MODULES if "." in module}
    # Progress bars know nothing of kdcache and are used by every verb; __main__ only calls the command line.
    assert top - layered == {"progress", "__main__"}
    assert layered <= top


def test_no_modules_import_each_other_in_a_circle():
    import grimp

    # Imports for type checking count too: a circle of types is a circle of ideas.
    graph = grimp.build_graph("kdcache", cache_dir=None)
    assert len(graph.modules) > 50
    imported = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while free := [module for module, others in imported.items() if not others]:
        for module in free:
            del imported[module]
        for others in imported.values():
            others.difference_update(free)
    assert not imported, "these modules, or modules that they import, form a circle"


@loop("module", [m for m in MODULES if "\n__all__ = " in path_of(m).read_text()])
def test_public_names_exist_and_are_sorted(module):
    loaded = importlib.import_module(module)
    assert loaded.__all__
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    for name in loaded.__all__:
        assert hasattr(loaded, name), name


def test_no_file_is_a_drawer_of_everything():
    names = {path.stem for folder in ("kdcache", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
