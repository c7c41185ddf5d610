"""Dumping a teacher: from a corpus and a model to a cache."""

from kdcache.dump.config import DumpConfig
from kdcache.dump.preview import DumpEstimate, estimate_dump
from kdcache.dump.run import DumpResult, dump, dump_teacher
from kdcache.targets_config import HiddenStatesConfig, TargetsConfig

__all__ = [
    "DumpConfig",
    "DumpEstimate",
    "DumpResult",
    "HiddenStatesConfig",
    "TargetsConfig",
    "dump",
    "dump_teacher",
    "estimate_dump",
]
