"""What a cache says about itself, for people and their scripts: the manifest and the totals that follow from it."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from kdcache.cache import layout
from kdcache.cache.reader import Cache, as_cache


def inspect_cache(cache: Cache | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of a cache, open or at a path, and its totals, as plain JSON types."""
    cache = as_cache(cache)
    manifest = cache.manifest
    sums = manifest.statistics
    count = max(sums.num_positions, 1)
    num_labelled = sums.num_positions - sums.num_unlabelled
    loss = sums.teacher_loss_sum / num_labelled if num_labelled else None
    has_distribution = manifest.targets.kind != "outputs"
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
            "teacher_entropy": sums.entropy_sum / count if has_distribution else None,
            "kept_mass": sums.kept_mass_sum / count if has_distribution else None,
            # Samples alone only suggest the teacher's favourite.
            "teacher_top1_accuracy": sums.top1_correct / num_labelled if manifest.top_k and num_labelled else None,
        },
    }
