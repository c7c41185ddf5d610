"""Dumping a teacher: from a corpus and a model to a cache."""

from kdcache.dump.config import DumpConfig
from kdcache.dump.preview import DumpPreview, preview_dump
from kdcache.dump.run import DumpResult, dump, dump_teacher
from kdcache.targets_config import HiddenStatesConfig, TargetsConfig

__all__ = [
    "DumpConfig",
    "DumpPreview",
    "DumpResult",
    "HiddenStatesConfig",
    "TargetsConfig",
    "dump",
    "dump_teacher",
    "preview_dump",
]
