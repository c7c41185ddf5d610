"""Writing targets: the teacher answers every input of a corpus, and its texts make a corpus to dump and train on."""

from kdcache.write_targets.config import WriteConfig, WritingConfig
from kdcache.write_targets.run import TargetsEstimate, WriteResult, estimate_targets, write_targets

__all__ = ["TargetsEstimate", "WriteConfig", "WriteResult", "WritingConfig", "estimate_targets", "write_targets"]
