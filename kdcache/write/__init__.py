"""Write targets: the teacher answers every input of a corpus, and its texts make a corpus to dump and train on.

The configurations need neither torch nor transformers; everything else is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdcache.write.config import Sampling, WriteConfig, WritingConfig

if TYPE_CHECKING:
    from kdcache.write.run import TargetsPreview, WriteResult, preview_targets, write_targets

_IN_RUN = ("TargetsPreview", "WriteResult", "preview_targets", "write_targets")

__all__ = [
    "Sampling",
    "TargetsPreview",
    "WriteConfig",
    "WriteResult",
    "WritingConfig",
    "preview_targets",
    "write_targets",
]


def __getattr__(name: str) -> Any:
    if name not in _IN_RUN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("kdcache.write.run"), name)
