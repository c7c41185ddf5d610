"""Tables of components by name: losses, terms, tasks, codecs, pacings, teacher backends, field kinds.

A row is an object or a string ``"module:attribute"``, which is imported when its name is first used. Installed packages
add rows by entry points in the group of the table, such as ``[project.entry-points."kdcache.losses"] hellinger =
"mine:Hellinger"``. Listing names imports nothing, so a package that cannot be imported breaks its own names only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from kdcache.errors import ConfigError, unknown

R = TypeVar("R")


class UnknownName(ConfigError, ValueError):
    """A name that is not in a table. It is a ``ValueError`` too, so that pydantic's validators may raise it."""


class Table(Mapping[str, R], Generic[R]):
    """A mapping of names to rows, which are imported on first use.

    ``kind`` is the name of a row in errors, ``group`` the entry-point group for other packages. ``rows`` are objects or
    strings ``"module:attribute"``. ``make`` converts an imported object to the row (default: the object itself).

    ``table[name]`` raises `UnknownName` for an unknown name. It raises ``ConfigError``, naming the package, for a
    plugin that cannot be imported and for a name that several packages add.
    """

    def __init__(
        self, kind: str, group: str, rows: Mapping[str, R | str], *, make: Callable[[Any], R] | None = None
    ) -> None:
        self.kind = kind
        self.group = group
        self._rows = dict(rows)
        self._make = make
        self._used: dict[str, R] = {}

    def __getitem__(self, name: str) -> R:
        """Return the row ``name``; imports it on first use."""
        if name not in self._used:
            self._used[name] = self._resolve(name)
        return self._used[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the row ``name``, or ``default`` for an unknown name; raises ``ConfigError`` for a broken plugin."""
        if name not in self:
            return default
        return self[name]

    def __contains__(self, name: object) -> bool:
        """Return whether ``name`` is known; imports nothing."""
        return name in self._rows or name in self._plugins

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, plugins last; imports nothing."""
        yield from self._rows
        yield from (name for name in self._plugins if name not in self._rows)

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        return f"Table({self.kind!r}: {', '.join(self)})"

    @property
    def own(self) -> tuple[str, ...]:
        """The names of kdcache itself; reads no entry points."""
        return tuple(self._rows)

    def names(self) -> tuple[str, ...]:
        """Return all names, plugins last; imports nothing."""
        return tuple(iter(self))

    def check(self, name: str) -> None:
        """Raise `UnknownName` unless ``name`` is known; imports nothing."""
        if name not in self:
            raise UnknownName(unknown(self.kind, name, self))

    def importable(self) -> dict[str, R]:
        """Return all rows that can be imported, for lists and help texts."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except ConfigError:
                continue
        return found

    @cached_property
    def _plugins(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            found.setdefault(entry.name, []).append(entry)
        return found

    def _resolve(self, name: str) -> R:
        self.check(name)
        entries = self._plugins.get(name, [])
        if len(entries) + (name in self._rows) > 1:
            owners = [*(["kdcache"] if name in self._rows else []), *map(_package, entries)]
            raise ConfigError(
                f"the {self.kind} {name!r} is added by {' and '.join(owners)}; uninstall or rename all but one "
                f"(entry points in the group {self.group})"
            )
        if entries:
            return self._load(name, entries[0])
        row = self._rows[name]
        found = import_row(row) if isinstance(row, str) else row
        return found if self._make is None else self._make(found)

    def _load(self, name: str, entry: EntryPoint) -> R:
        try:
            found = entry.load()
            return found if self._make is None else self._make(found)
        except Exception as error:  # whatever another package's module raises
            raise ConfigError(
                f"the {self.kind} {name!r} of {_package(entry)} cannot be imported from {entry.value}: {error!r}; "
                "repair or uninstall that package"
            ) from error


def import_row(path: str) -> Any:
    """Import the object ``"module:attribute"``."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def _package(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name!r}" if entry.dist is not None else "an unnamed package"
