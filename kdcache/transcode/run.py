"""Transcoding: read a finished cache piece by piece, change what is to change, and write another one.

The output is written as a dump writes it, by the same writer: planned first, shard by shard, committed, resumable. A
second thread encodes and writes a shard while the next one is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from kdcache.cache import CacheWriter, layout, open_cache
from kdcache.cache.output_dir import refuse_foreign
from kdcache.cache.write_behind import WriteBehind
from kdcache.errors import CorruptCacheError
from kdcache.progress import bar
from kdcache.schema import Manifest, ShardRecord
from kdcache.storage.folder import Folder, check_no_overlap
from kdcache.transcode.config import TranscodeConfig
from kdcache.transcode.places import refuse_another_origin
from kdcache.transcode.plan import Transcoding, plan_transcoding
from kdcache.transcode.shards import TargetsMaker, copied_fields, make_shard, targets_maker
from kdcache.verify.stored import verify_cache


@dataclass
class TranscodeResult:
    """What a transcoding did: the finished manifest, and what this run added to it."""

    source: str
    output: str
    manifest: Manifest
    source_bytes_per_token: float
    num_shards_written: int
    num_positions_written: int
    elapsed_s: float
    verified: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        values = {name: value for name, value in vars(self).items() if name != "manifest"}
        totals = ("num_sequences", "num_positions", "num_shards", "num_bytes", "bytes_per_token")
        return {**values, **{name: getattr(self.manifest, name) for name in totals}}


def transcode_cache(config: TranscodeConfig, *, check: bool = True, progress: bool = True) -> TranscodeResult:
    """Make the cache at ``config.output`` from the finished one at ``config.source``, or finish it.

    With ``check`` every byte that was written is read again and compared with its hash. Raises ``ConfigError`` for what
    the source cannot become, ``CacheError`` for a source or an output that cannot be used; what was committed before
    stays, and the same call resumes from there.
    """
    job = load_transcoding(config)
    maker = targets_maker(job, config)
    began = time.perf_counter()
    with CacheWriter(Folder(config.output)) as writer:
        refuse_another_origin(writer.folder, job.plan)
        manifest, written = _transcode(job, maker, writer, config.batch_positions, progress)
    if check:
        _check_written(config.output, progress)
    return TranscodeResult(
        source=config.source,
        output=config.output,
        manifest=manifest,
        source_bytes_per_token=job.cache.manifest.bytes_per_token,
        num_shards_written=len(written),
        num_positions_written=sum(record.num_positions for record in written),
        elapsed_s=time.perf_counter() - began,
        verified=check,
    )


def load_transcoding(config: TranscodeConfig) -> Transcoding:
    """Open the source of ``config`` and plan the output, after checking that it may be written where it is to be."""
    check_no_overlap(Folder(config.source), Folder(config.output))
    refuse_foreign(Folder(config.output))
    return plan_transcoding(config, open_cache(config.source, max_open_shards=1))  # they are read one after another


def _transcode(
    job: Transcoding, maker: TargetsMaker, writer: CacheWriter, batch_positions: int, progress: bool
) -> tuple[Manifest, list[ShardRecord]]:
    """Write every shard that is not committed yet, then the manifest."""
    missing = writer.begin(job.plan, job.table, _tokenizer_files(job), _cache_files(job))
    positions_of = [int(job.lengths_N[job.starts[s] : job.starts[s + 1]].sum()) for s in range(job.plan.num_shards)]
    done = job.plan.num_positions - sum(positions_of[shard] for shard in missing)
    with (
        bar(job.plan.num_positions, "transcode", "tok", enabled=progress, initial=done) as meter,
        WriteBehind(writer.write_shard) as writes,  # with the shard that is made, memory holds two
    ):
        for shard in missing:
            members = slice(int(job.starts[shard]), int(job.starts[shard + 1]))
            data = make_shard(job, maker, shard, members, batch_positions, meter)
            data.copied = copied_fields(job, shard)
            writes.put(data)
    return writer.finalise(), writes.written


def _tokenizer_files(job: Transcoding) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(job.cache.tokenizer_dir().iterdir())}


def _cache_files(job: Transcoding) -> dict[str, bytes]:
    return {layout.LM_HEAD: job.cache.lm_head_file()} if job.plan.targets.kind == "hidden" else {}


def _check_written(output: str, progress: bool) -> None:
    report = verify_cache(output, progress=progress)
    if not report.ok:
        raise CorruptCacheError(
            f"{output} is not what was written: {'; '.join(report.problems[:3])}. The disk may be at fault; delete it "
            "and run the same command again"
        )
