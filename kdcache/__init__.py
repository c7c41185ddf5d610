"""Offline knowledge distillation of language models.

::

    import kdcache

    kdcache.dump_teacher(kdcache.DumpConfig(
        output="cache", teacher={"model": "HuggingFaceTB/SmolLM2-135M"}, corpus={"paths": ["texts/"]}))
    kdcache.train_student(kdcache.TrainConfig(cache="cache", student={"size": "small"}, output="run"))
    print(kdcache.evaluate("held-out-cache", ["run"]).table())

    batch = kdcache.open_cache("cache").read([0, 1, 2])   # numpy: tokens, targets, masks

Importing kdcache imports nothing heavy; each name below is loaded when it is first used, and only the dump, training
and evaluation need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.cache import Cache, VerifyReport, open_cache, verify
    from kdcache.dump import DumpConfig, dump_teacher, estimate_dump
    from kdcache.errors import KdcacheError
    from kdcache.evaluation import evaluate
    from kdcache.losses import Objective, ObjectiveConfig
    from kdcache.train import TrainConfig, plan_training, train_student
    from kdcache.transcode import TranscodeConfig, transcode_cache
    from kdcache.viewer import peek

__version__ = "0.1.0"

_HOMES = {
    "Cache": "kdcache.cache",
    "DumpConfig": "kdcache.dump",
    "KdcacheError": "kdcache.errors",
    "Objective": "kdcache.losses",
    "ObjectiveConfig": "kdcache.losses",
    "TrainConfig": "kdcache.train",
    "TranscodeConfig": "kdcache.transcode",
    "VerifyReport": "kdcache.cache",
    "dump_teacher": "kdcache.dump",
    "estimate_dump": "kdcache.dump",
    "evaluate": "kdcache.evaluation",
    "open_cache": "kdcache.cache",
    "peek": "kdcache.viewer",
    "plan_training": "kdcache.train",
    "train_student": "kdcache.train",
    "transcode_cache": "kdcache.transcode",
    "verify": "kdcache.cache",
}

__all__ = [
    "Cache",
    "DumpConfig",
    "KdcacheError",
    "Objective",
    "ObjectiveConfig",
    "TrainConfig",
    "TranscodeConfig",
    "VerifyReport",
    "dump_teacher",
    "estimate_dump",
    "evaluate",
    "open_cache",
    "peek",
    "plan_training",
    "train_student",
    "transcode_cache",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
