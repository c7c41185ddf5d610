"""Group sequences into batches: as many as fit a budget of padded tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def batches_by_length(lengths_N: NDArray[np.int64], batch_tokens: int) -> list[list[int]]:
    """Group all sequences, longest first, within ``batch_tokens`` (see `batches_in_order`).

    Neighbours are of similar length, so there is little padding, and a batch that does not fit in memory fails in the
    first second and not in the last hour. Returns lists of indices into ``lengths_N``.
    """
    return batches_in_order(np.argsort(-lengths_N, kind="stable").tolist(), lengths_N, batch_tokens)


def batches_in_order(
    indices: Iterable[int], lengths_N: NDArray[np.int64], batch_tokens: int, *, max_sequences: int | None = None
) -> list[list[int]]:
    """Group ``indices`` in their order, so that (count x longest) of a group stays within ``batch_tokens``.

    A group has at most ``max_sequences`` (default: any number). A sequence longer than the budget is a group of its
    own.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in indices:
        length = int(lengths_N[index])
        longest = max(longest, length)
        if groups and len(groups[-1]) != max_sequences and (len(groups[-1]) + 1) * longest <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = length
    return groups
