"""Components of other packages: rows that they add to the tables of kdcache through entry points.

A package names them in its metadata, such as ``[project.entry-points."kdcache.losses"] hellinger = "mine:Hellinger"``.
They are read where a table is made, so whatever is made from the table (configuration, choices of the command line)
knows them. What a plugin imports of kdcache must therefore be below the table: submodules, not the package around it.
"""

from __future__ import annotations

from collections.abc import Container
from importlib.metadata import entry_points
from typing import Any

from kdcache.errors import ConfigError


def plugins(group: str, taken: Container[str]) -> dict[str, Any]:
    """Return the objects that installed packages name in an entry-point ``group``, by name.

    Raises ``ConfigError`` for a name that is ``taken`` and for one that cannot be loaded, naming the package.
    """
    found = {}
    for entry in entry_points(group=group):
        package = entry.dist.name if entry.dist is not None else "a package"
        if entry.name in taken or entry.name in found:
            raise ConfigError(f"{package} adds {entry.name!r} to {group}, where that is taken; rename or remove it")
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # whatever a stranger's module raises
            raise ConfigError(f"{package} adds {entry.name!r} to {group}, but it cannot be loaded: {error!r}") from None
    return found
