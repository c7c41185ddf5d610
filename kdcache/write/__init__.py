"""Writing targets: the teacher answers every input of a corpus, and its texts make a corpus to dump and train on."""

from kdcache.write.config import WriteConfig, WritingConfig
from kdcache.write.run import TargetsPreview, WriteResult, preview_targets, write_targets

__all__ = ["TargetsPreview", "WriteConfig", "WriteResult", "WritingConfig", "preview_targets", "write_targets"]
