"""Transcoding: another cache from a finished one, without the teacher."""

from kdcache.transcode.config import TranscodeConfig
from kdcache.transcode.preview import TranscodeEstimate, estimate_transcode
from kdcache.transcode.run import TranscodeResult, transcode_cache

__all__ = ["TranscodeConfig", "TranscodeEstimate", "TranscodeResult", "estimate_transcode", "transcode_cache"]
