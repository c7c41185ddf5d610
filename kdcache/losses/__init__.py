"""Losses between a student and its teacher's cached rows, and the objective that sums them.

`Objective` trains, `score_positions` evaluates; both walk over the positions in chunks (`kernel`), show each chunk to
the losses as a `ChunkView`, and know the losses from one table, `LOSSES`. Terms (`Term`, table `TERMS`) compare other
outputs of the student with the teacher's, and may own parameters. `TeacherContext` says what kind of cache the
rows come from, and `incompatibility` which losses make sense with it. Only `from_cache` reads a cache.

The names below are loaded when they are first used: settings (`ObjectiveConfig`) and tables need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.losses.base import LayerStates, Loss, Needs, Outputs, Part, Term, TermModule, incompatibility
    from kdcache.losses.config import ObjectiveConfig
    from kdcache.losses.divergences import CrossEntropy, ForwardKL
    from kdcache.losses.objective import Objective, ObjectiveOutput
    from kdcache.losses.registry import LOSSES, TERMS
    from kdcache.losses.schedules import SCHEDULES
    from kdcache.losses.scores import PositionScores, per_position_values, score_positions
    from kdcache.losses.selection import MEASURES, Select
    from kdcache.losses.teacher import TeacherContext, TeacherRows
    from kdcache.losses.view import ChunkView

_HOMES = {
    "base": ("LayerStates", "Loss", "Needs", "Outputs", "Part", "Term", "TermModule", "incompatibility"),
    "config": ("ObjectiveConfig",),
    "divergences": ("CrossEntropy", "ForwardKL"),
    "objective": ("Objective", "ObjectiveOutput"),
    "registry": ("LOSSES", "TERMS"),
    "schedules": ("SCHEDULES",),
    "scores": ("PositionScores", "per_position_values", "score_positions"),
    "selection": ("MEASURES", "Select"),
    "teacher": ("TeacherContext", "TeacherRows"),
    "view": ("ChunkView",),
}

__all__ = [
    "LOSSES",
    "MEASURES",
    "SCHEDULES",
    "TERMS",
    "ChunkView",
    "CrossEntropy",
    "ForwardKL",
    "LayerStates",
    "Loss",
    "Needs",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveOutput",
    "Outputs",
    "Part",
    "PositionScores",
    "Select",
    "TeacherContext",
    "TeacherRows",
    "Term",
    "TermModule",
    "incompatibility",
    "per_position_values",
    "score_positions",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"kdcache.losses.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'kdcache.losses' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
