"""The causal task over plain lists of tokens, as most tests have them."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache.schema import Sequence
from kdcache.tasks import task_of

TASK = task_of("causal-lm")
collate = TASK.collate


def sequences(tokens: list[Any], segment_ids: list[Any] | None = None) -> list[Sequence]:
    """Return runs of tokens as sequences whose positions all count."""
    segments = segment_ids or [None] * len(tokens)
    return [
        Sequence(n, np.asarray(ids), np.ones(len(ids) - 1, np.uint8), parts)
        for n, (ids, parts) in enumerate(zip(tokens, segments, strict=True))
    ]


def labels(tokens: list[Any]) -> np.ndarray:
    return TASK.labels(sequences(tokens))


def pad_batch(tokens: list[Any], pad_id: int, segment_ids: list[Any] | None = None) -> dict[str, np.ndarray]:
    """Return what models are fed, with the labels beside it."""
    found = sequences(tokens, segment_ids)
    return {**TASK.pad_batch(found, pad_id), "labels": TASK.labels(found)}
