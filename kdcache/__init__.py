"""Offline knowledge distillation of language models.

::

    import kdcache

    kdcache.dump_teacher(kdcache.DumpConfig(
        output="cache", teacher={"model": "HuggingFaceTB/SmolLM2-135M"}, corpus={"paths": ["texts/"]}))
    kdcache.train_student(kdcache.TrainConfig(cache="cache", student={"size": "small"}, output="run"))
    print(kdcache.evaluate_students("held-out-cache", ["run"]).table())

    batch = kdcache.open_cache("cache").read([0, 1, 2])   # numpy: tokens, targets, masks

Importing kdcache imports nothing heavy; each name below is loaded when it is first used, and only the dump, training
and evaluation need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.cache import Cache, open_cache
    from kdcache.cache.arrow import to_arrow, to_arrow_reader
    from kdcache.cache.hf_dataset import to_hf_dataset
    from kdcache.dump import DumpConfig, dump_teacher, preview_dump
    from kdcache.errors import KdcacheError
    from kdcache.evaluate import evaluate_students
    from kdcache.losses import Objective, ObjectiveConfig, TeacherRows
    from kdcache.losses.from_cache import context_of
    from kdcache.peek import peek_cache
    from kdcache.students import StudentConfig, load_student
    from kdcache.torch_data import to_torch
    from kdcache.train import TrainConfig, preview_training, train_student
    from kdcache.transcode import TranscodeConfig, transcode_cache
    from kdcache.verify.stored import VerifyReport, verify_cache

__version__ = "0.1.0"

_HOMES = {
    "Cache": "kdcache.cache",
    "DumpConfig": "kdcache.dump",
    "KdcacheError": "kdcache.errors",
    "Objective": "kdcache.losses",
    "ObjectiveConfig": "kdcache.losses",
    "StudentConfig": "kdcache.students",
    "TeacherRows": "kdcache.losses",
    "TrainConfig": "kdcache.train",
    "TranscodeConfig": "kdcache.transcode",
    "VerifyReport": "kdcache.verify.stored",
    "context_of": "kdcache.losses.from_cache",
    "dump_teacher": "kdcache.dump",
    "preview_dump": "kdcache.dump",
    "evaluate_students": "kdcache.evaluate",
    "load_student": "kdcache.students",
    "open_cache": "kdcache.cache",
    "peek_cache": "kdcache.peek",
    "preview_training": "kdcache.train",
    "to_arrow": "kdcache.cache.arrow",
    "to_arrow_reader": "kdcache.cache.arrow",
    "to_hf_dataset": "kdcache.cache.hf_dataset",
    "to_torch": "kdcache.torch_data",
    "train_student": "kdcache.train",
    "transcode_cache": "kdcache.transcode",
    "verify_cache": "kdcache.verify.stored",
}

__all__ = [
    "Cache",
    "DumpConfig",
    "KdcacheError",
    "Objective",
    "ObjectiveConfig",
    "StudentConfig",
    "TeacherRows",
    "TrainConfig",
    "TranscodeConfig",
    "VerifyReport",
    "context_of",
    "dump_teacher",
    "evaluate_students",
    "load_student",
    "open_cache",
    "peek_cache",
    "preview_dump",
    "preview_training",
    "to_arrow",
    "to_arrow_reader",
    "to_hf_dataset",
    "to_torch",
    "train_student",
    "transcode_cache",
    "verify_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
