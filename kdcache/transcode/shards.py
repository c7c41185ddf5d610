"""Build one output shard from its sequences in the source."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

from numpy.typing import NDArray

from kdcache.cache import ShardBuilder, ShardData
from kdcache.cache.shards import load_fields, naming
from kdcache.cache.tail_prior import TailSum
from kdcache.corpus import assign_shards
from kdcache.fields import TARGETS_FIELD, TOKENS_FIELD, known_fields
from kdcache.schema import SequenceBatch, Targets
from kdcache.tasks import task_of
from kdcache.transcode.config import TranscodeConfig, needs_head
from kdcache.transcode.cut import TargetsCutter
from kdcache.transcode.plan import Transcoding


class TargetsMaker(Protocol):
    """Makes the targets of the output from a batch of the source."""

    def __call__(self, batch: SequenceBatch) -> Targets:
        """Return the targets of a batch."""
        ...

    def take_tail_sum(self) -> TailSum | None:
        """Return what all rows since the last call add to the tail prior."""
        ...


def targets_maker(job: Transcoding, config: TranscodeConfig) -> TargetsMaker:
    """Return what makes the targets that ``job`` plans."""
    held, wanted = job.cache.manifest.targets, job.plan.targets
    if not needs_head(held, wanted):
        return TargetsCutter(held, wanted, job.cache.vocab_size, job.cache.tail_prior_V if wanted.tail_prior else None)
    from kdcache.transcode.head import HeadKeeper  # torch, which nothing else here needs

    return HeadKeeper(job.cache, wanted, config.device)


def make_shard(
    job: Transcoding, maker: TargetsMaker, shard: int, members: slice, batch_positions: int, meter: Any = None
) -> ShardData:
    """Return the sequences ``members`` of the output as a shard, without the fields that are copied."""
    lengths_N = job.lengths_N[members]
    fields = known_fields(job.plan)
    encoded_again = [
        record.name for record in job.plan.fields if record.name not in (*job.copied, TOKENS_FIELD, TARGETS_FIELD)
    ]
    builder = ShardBuilder(shard, fields)
    for first, last in pairwise(assign_shards(lengths_N, batch_positions).tolist()):
        batch = job.cache.read(job.chosen_N[members][first:last], fields=encoded_again)
        staged = {name: fields[name].stage(batch.fields[name]) for name in encoded_again}
        if TARGETS_FIELD in fields:  # where they are copied too: the statistics are of them
            staged[TARGETS_FIELD] = maker(batch)
        builder.put(range(first, last), batch.sequences(), staged)
        if meter is not None:
            meter.update(batch.num_positions)
    table = job.sequence_table.slice(members.start, members.stop - members.start).combine_chunks()
    return builder.build(table, task_of(job.plan.task).stored_labels, tail_sum=maker.take_tail_sum())


def copied_fields(job: Transcoding, shard: int) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the fields that are copied as they are stored: without a filter, shards are those of the source."""
    manifest = job.cache.manifest
    if not job.copied:
        return {}
    found = load_fields(job.cache.folder, manifest, manifest.shards[shard], job.copied)
    for name, arrays in found.items():
        if name in job.cache.fields:  # opening checks what is in them; a field of an unknown kind is copied as it is
            with naming(job.cache.folder, manifest, shard, name):
                job.cache.fields[name].open(arrays)
    return found
