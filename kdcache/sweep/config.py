"""The settings of a sweep: what all students share, and what varies.

Variations are a grid (the product of lists of values), a list of named runs, or both; they change the shared settings
by dotted keys, exactly as ``--set`` of ``train-student`` changes those of ``--config``. There is no search: all
variations are known before the first student trains, so they can be checked beforehand and resumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from kdcache.config import Config, build, read_yaml

#: Files of the sweep itself, next to the directories of its students.
SWEEP_FILE = "sweep.json"
TABLE_FILE = "table.md"
PLOT_FILE = "quality.png"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")
_RESERVED = (SWEEP_FILE, TABLE_FILE, PLOT_FILE)


class NamedRun(Config):
    """A variation by name: ``set`` changes shared settings, nested or by dotted keys."""

    name: str
    set: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _names_a_directory(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
            raise ValueError(
                "a name is used as a directory: begin with a letter or digit, continue with these or any of ._+=,- and "
                f"avoid {', '.join(_RESERVED)}"
            )
        return name


class SweepConfig(Config):
    """A sweep: many students that differ in some settings, trained ``jobs`` at a time, evaluated on one held-out cache.

    ``base`` (or ``base_file``) holds the settings of `TrainConfig` that all share, without ``output``: every student
    gets the directory ``output``/name. ``grid`` maps dotted keys to lists of values and trains every combination;
    ``runs`` are trained in addition; without both, one student of ``base`` is trained. ``seeds`` repeats every
    variation with other orders of the data and, for fresh students, other weights. ``jobs`` is by default 1 on a CPU
    and the number of GPUs elsewhere.
    """

    output: str
    base: dict[str, Any] | None = None
    base_file: str | None = None
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    runs: tuple[NamedRun, ...] = ()
    seeds: tuple[int, ...] = ()
    held_out: str | None = None
    jobs: int | None = Field(default=None, ge=1)

    @field_validator("output")
    @classmethod
    def _is_a_directory_here(cls, output: str) -> str:
        if not output.strip() or "://" in output:
            raise ValueError(f"give a directory on this machine for the students; found {output!r}")
        return output

    @field_validator("grid", mode="before")
    @classmethod
    def _lists_of_values(cls, grid: Any) -> Any:
        for key, values in grid.items() if isinstance(grid, Mapping) else ():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"{key} takes a list of values, such as [1, 2]; found {values!r}")
        return grid

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("list every seed once")
        return seeds

    @model_validator(mode="after")
    def _one_base(self) -> SweepConfig:
        if (self.base is None) == (self.base_file is None):
            raise ValueError("give base (settings of train-student) or base_file (a YAML file of them), and not both")
        return self

    def shared_settings(self) -> dict[str, Any]:
        """Return the settings that all students share; raises ``ConfigError`` for a file that cannot be read."""
        if self.base is not None:
            return self.base
        assert self.base_file is not None
        return read_yaml(self.base_file)


def read_sweep(file: str | Path) -> SweepConfig:
    """Read a sweep from a YAML file; raises ``ConfigError`` with one line per problem."""
    return build(SweepConfig, read_yaml(file), source=str(file))
