"""Describe a cache by its manifest: the manifest, and totals such as the teacher's perplexity and the size."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from kdcache.cache import layout
from kdcache.cache.reader import Cache, as_cache


def inspect_cache(cache: Cache | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of ``cache`` and its totals as plain JSON types; ``cache`` is a path, a URL or an open cache.

    Of the totals, ``num_bytes`` are those of the shards, ``folder_bytes`` those of all files. Losses and entropies are
    means over the positions that count, in nats. A total is None if the cache does not store
    what it is computed from.
    """
    cache = as_cache(cache)
    manifest = cache.manifest
    sums = manifest.statistics
    count = max(sums.num_positions, 1)
    num_labelled = sums.num_positions - sums.num_unlabelled
    targets = manifest.targets
    has_loss = "gold_logprob" in targets.scalars and num_labelled > 0
    loss = sums.teacher_loss_sum / num_labelled if has_loss else None
    # Kept ids that were renormalised have a mass of 1, which says nothing about the teacher.
    has_mass = targets.kind != "outputs" and targets.probabilities == "vocabulary"
    sizes = folder_sizes(cache)
    return {
        "path": str(cache.folder),
        "fingerprint": cache.fingerprint,
        **json.loads(layout.to_json(manifest)),
        "totals": {
            "num_bytes": manifest.num_bytes,
            "folder_bytes": sum(sizes.values()),
            "bytes_by_part": sizes,
            "bytes_per_token": manifest.bytes_per_token,
            "num_targets": sums.num_positions,
            "num_labelled": num_labelled,
            "teacher_loss": loss,
            "teacher_perplexity": None if loss is None else float(np.exp(loss)),
            "teacher_entropy": sums.entropy_sum / count if "entropy" in targets.scalars else None,
            "kept_mass": sums.kept_mass_sum / count if has_mass else None,
            # From samples alone the top-1 id is not known.
            "teacher_top1_accuracy": sums.top1_correct / num_labelled if manifest.top_k and num_labelled else None,
        },
    }


def folder_sizes(cache: Cache) -> dict[str, int]:
    """Return the bytes of the parts of a cache: its shards, its tokenizer, each file it has once, plan and records.

    Sizes are those of the manifest; those of plan and manifest, which it does not know, are asked of the store.
    """
    manifest, folder = cache.manifest, cache.folder
    asked = [folder.size(name) or 0 for name in (layout.MANIFEST, layout.PLAN, layout.PLAN_TABLE)]
    return {
        "shards": manifest.num_bytes,
        "tokenizer": sum(record.num_bytes for record in manifest.tokenizer_files),
        **{record.path: record.num_bytes for record in manifest.cache_files},
        "plan and records": sum(asked) + sum(len(layout.to_json(shard)) for shard in manifest.shards),
    }
