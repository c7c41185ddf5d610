"""Describe a cache from its manifest alone: the manifest and totals such as the teacher's perplexity."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from kdcache.cache import layout
from kdcache.cache.reader import Cache, as_cache


def inspect_cache(cache: Cache | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of ``cache`` and its totals as plain JSON types; ``cache`` is a path, a URL or an open cache.

    Losses and entropies are means over the positions that count, in nats. A total is None if the cache does not store
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
    return {
        "path": str(cache.folder),
        "fingerprint": cache.fingerprint,
        **json.loads(layout.to_json(manifest)),
        "totals": {
            "num_bytes": manifest.num_bytes,
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
