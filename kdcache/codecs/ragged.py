"""Rows of different lengths, stored without their padding.

In memory such rows are a rectangle [P, K] with padding after the first n of each row, because all computations need
rectangles. On disk only what counts is kept, column by column: the first entries of all rows, then
the second ones of those rows that have two, and so on. Neighbours then resemble each other as they do in a rectangle
that is stored transposed, and the rows' lengths say where everything belongs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError


def flatten(values_PK: NDArray[Any], lengths_P: NDArray[Any]) -> NDArray[Any]:
    """Return the first ``lengths_P[p]`` values of every row p, column by column."""
    columns_KP = np.ascontiguousarray(values_PK.T)
    return columns_KP[np.arange(len(columns_KP))[:, None] < lengths_P]


def expand(entries: NDArray[Any], lengths_P: NDArray[Any], width: int, name: str) -> NDArray[Any]:
    """Undo `flatten` into [P, width] (Fortran order), zeros behind each row.

    Raises ``CorruptCacheError`` naming array ``name`` when lengths and number of entries contradict each other.
    """
    longest = int(lengths_P.max(initial=0))
    if longest > width or int(lengths_P.sum(dtype=np.int64)) != len(entries):
        raise CorruptCacheError(
            f"{name} has {len(entries)} entries for rows of {int(lengths_P.sum(dtype=np.int64))} "
            f"(the longest {longest}, at most {width})"
        )
    columns_KP = np.zeros((width, len(lengths_P)), dtype=entries.dtype)
    columns_KP[np.arange(width)[:, None] < lengths_P] = entries
    return columns_KP.T
