"""Dumping a teacher: from a corpus and a model to a cache."""

from kdcache.dump.config import DumpConfig
from kdcache.dump.run import DumpEstimate, DumpResult, dump, dump_teacher, estimate_dump
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
