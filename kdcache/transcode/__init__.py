"""Transcoding: another cache from a finished one, without the teacher."""

from kdcache.transcode.config import TranscodeConfig
from kdcache.transcode.preview import TranscodePreview, preview_transcoding
from kdcache.transcode.run import TranscodeResult, transcode_cache

__all__ = ["TranscodeConfig", "TranscodePreview", "TranscodeResult", "preview_transcoding", "transcode_cache"]
