"""Write the lowest versions that pyproject.toml allows, as constraints for pip: ``python -m tests.lowest > FILE``.

``make test-lowest`` installs exactly these and runs the default tests with them. A bound that is too low fails there,
be it that pip finds no way to install it beside the others or that a test fails; so the bounds are measured, not
guessed. What has no lower bound is not constrained.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest_versions(pyproject: Path = PYPROJECT) -> dict[str, str]:
    """Return the lowest version of every requirement that has one, by name; extras included."""
    found: dict[str, str] = {}
    for requirement in _requirements(pyproject):
        bounds = [item.version for item in requirement.specifier if item.operator == ">="]
        if bounds and found.setdefault(requirement.name, bounds[0]) != bounds[0]:
            raise ValueError(f"{requirement.name} has the lower bounds {found[requirement.name]} and {bounds[0]}")
    return found


def _requirements(pyproject: Path) -> Iterator[Requirement]:
    project = tomllib.loads(pyproject.read_text())["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, lines)


if __name__ == "__main__":
    sys.stdout.write("".join(f"{name}=={version}\n" for name, version in sorted(lowest_versions().items())))
