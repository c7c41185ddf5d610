"""Which sequences a model is fed together.

Those of similar length, so little is padded; the longest go first, so a batch that does not fit fails in the first
second and not in the last hour.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def batches_by_length(lengths_N: NDArray[np.int64], batch_tokens: int) -> list[list[int]]:
    """Group sequences, longest first, so that (count x longest) of a group stays within ``batch_tokens``.

    Returns lists of indices into ``lengths_N``; a sequence longer than the budget makes a group of its own.
    """
    order = np.argsort(-lengths_N, kind="stable")
    groups: list[list[int]] = []
    for index in order.tolist():
        if groups and (len(groups[-1]) + 1) * lengths_N[groups[-1][0]] <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
