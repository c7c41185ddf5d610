"""Train students from a cache (see ``kdcache.train.run``).

`TrainConfig` needs neither torch nor transformers; everything else is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdcache.train.config import TrainConfig

if TYPE_CHECKING:
    from kdcache.train.module import Distiller
    from kdcache.train.prepare import leave_processes
    from kdcache.train.preview import preview_training
    from kdcache.train.report import TrainingReport
    from kdcache.train.run import TrainResult, train_student

_HOMES = {
    "Distiller": "module",
    "TrainResult": "run",
    "TrainingReport": "report",
    "leave_processes": "prepare",
    "preview_training": "preview",
    "train_student": "run",
}

__all__ = [
    "Distiller",
    "TrainConfig",
    "TrainResult",
    "TrainingReport",
    "leave_processes",
    "preview_training",
    "train_student",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
