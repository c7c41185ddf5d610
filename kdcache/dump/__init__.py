"""Dumping a teacher: from a corpus and a model to a cache."""

from kdcache.dump.config import DumpConfig, HiddenStatesConfig, TargetsConfig
from kdcache.dump.run import DumpEstimate, DumpResult, dump, dump_teacher, estimate_dump

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
