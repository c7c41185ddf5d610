"""What a transcoding would make, before it is made: its plan, and the bytes that its first positions take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kdcache.cache import ShardData, layout
from kdcache.cache.shard_data import encode_field, with_statistics
from kdcache.cache.shard_file import pack
from kdcache.fields import field_of
from kdcache.storage.folder import Folder
from kdcache.transcode.config import TranscodeConfig
from kdcache.transcode.places import num_committed
from kdcache.transcode.plan import Transcoding
from kdcache.transcode.run import load_transcoding
from kdcache.transcode.shards import make_shard, targets_maker

#: Positions that a dry run encodes.
_PILOT_POSITIONS = 8192


@dataclass
class TranscodePreview:
    """What a transcoding would make, from its plan and its first positions."""

    source: str
    output: str
    num_sequences: int
    source_num_sequences: int
    num_positions: int
    source_num_positions: int
    num_shards: int
    num_shards_committed: int
    targets: dict[str, Any]
    field_bytes_per_token: dict[str, float] = field(default_factory=dict)
    source_bytes_per_token: float = 0.0
    kept_mass: float = 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all fields per position."""
        return sum(self.field_bytes_per_token.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return int(self.num_positions * self.bytes_per_token)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "bytes_per_token": self.bytes_per_token, "total_bytes": self.total_bytes}


def preview_transcoding(config: TranscodeConfig) -> TranscodePreview:
    """Return what `transcode_cache` would make, from its first positions; writes nothing, raises the same errors."""
    job = load_transcoding(config)
    count = max(1, int(np.searchsorted(np.cumsum(job.lengths_N), _PILOT_POSITIONS)))
    data = make_shard(job, targets_maker(job, config), 0, slice(0, count), config.batch_positions)
    source = job.cache.manifest
    return TranscodePreview(
        source=config.source,
        output=config.output,
        num_sequences=job.plan.num_sequences,
        source_num_sequences=source.num_sequences,
        num_positions=job.plan.num_positions,
        source_num_positions=source.num_positions,
        num_shards=job.plan.num_shards,
        num_shards_committed=num_committed(Folder(config.output), job.plan),
        targets=job.plan.targets.model_dump(mode="json"),
        field_bytes_per_token=_field_bytes(job, data),
        source_bytes_per_token=source.bytes_per_token,
        kept_mass=0.0 if data.targets is None else float((1 - np.exp(data.targets.log_tail_P)).mean()),
    )


def _field_bytes(job: Transcoding, data: ShardData) -> dict[str, float]:
    """Return the bytes per position of every field: measured where it is encoded, else those of the source."""
    source = job.cache.manifest
    sizes = {layout.SEQUENCES_FIELD: len(layout.table_to_ipc(with_statistics(data)))}
    for item in job.plan.fields:
        if item.name not in job.copied:
            sizes[item.name] = len(pack(encode_field(field_of(item, job.plan), data)))
    as_before = {
        name: sum(shard.objects[name].num_bytes for shard in source.shards) / max(source.num_positions, 1)
        for name in job.copied
    }
    found = as_before | {name: size / data.num_positions for name, size in sizes.items()}
    return {name: found[name] for name in (*(item.name for item in job.plan.fields), layout.SEQUENCES_FIELD)}
