"""One shard of the output, from the sequences of the source that belong to it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import ShardData, layout
from kdcache.cache.shards import load_shard
from kdcache.cache.tail_prior import TailSum
from kdcache.codecs import vector_codec
from kdcache.corpus import assign_shards
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
    encoded_again = [name for name in job.plan.vector_fields if name not in job.copied]
    batches: list[SequenceBatch] = []
    staged: dict[str, list[NDArray[Any]]] = {name: [] for name in encoded_again}
    bounds = assign_shards(lengths_N, batch_positions)
    for first, last in pairwise(bounds.tolist()):
        batch = job.cache.read(job.chosen_N[members][first:last], hidden=encoded_again)
        batch.targets = maker(batch)
        for name in encoded_again:
            staged[name].append(vector_codec(job.plan.field(name).codec).stage(batch.hidden[name]))
        batch.hidden = {}
        batches.append(batch)
        if meter is not None:
            meter.update(batch.targets.num_positions)
    sequences = [sequence for batch in batches for sequence in batch.sequences()]
    segments = [batch.segment_ids_T for batch in batches if batch.segment_ids_T is not None]
    places = [batch.token_index_P for batch in batches if batch.token_index_P is not None]
    return ShardData(
        index=shard,
        tokens_T=np.concatenate([batch.tokens_T for batch in batches]),
        num_tokens_N=np.concatenate([np.diff(batch.token_offsets_N1) for batch in batches]),
        num_positions_N=lengths_N,
        loss_mask_P=np.concatenate([batch.loss_mask_P for batch in batches]),
        labels_P=task_of(job.plan.task).stored_labels(sequences),
        targets=Targets.concatenate([batch.targets for batch in batches]),
        table=job.sequence_table.slice(members.start, members.stop - members.start).combine_chunks(),
        segment_ids_T=np.concatenate(segments) if segments else None,
        token_index_P=np.concatenate(places) if places else None,
        hidden={name: np.concatenate(parts) for name, parts in staged.items()},
        tail_sum=maker.take_tail_sum(),
    )


def copied_fields(job: Transcoding, shard: int) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the fields that are copied as they are stored: without a filter, shards are those of the source."""
    if not job.copied:
        return {}
    manifest = job.cache.manifest
    names = dict.fromkeys((layout.TARGETS_FIELD, *job.copied))  # the targets say how long everything is
    loaded = load_shard(job.cache.folder, manifest, manifest.shards[shard], names).fields
    return {name: loaded[name] for name in job.copied}
