"""Columns of Arrow tables as NumPy arrays, without pandas.

pyarrow's own conversions import pandas where it is installed, which takes half a second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

#: Arrow's names of numbers where NumPy has others. (pyarrow's own conversion of types may import pandas, too.)
_DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64"}


def as_numpy(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Return a column as an array, [N]; integers keep their type, integers with nulls become floats with NaN."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    kind = column.type
    if pa.types.is_boolean(kind) and not column.null_count:
        return np.concatenate([np.zeros(0, bool), *(_numbers(chunk.cast(pa.uint8())).view(bool) for chunk in chunks)])
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or column.null_count:
        return np.asarray(column)
    return np.concatenate([np.zeros(0, _DTYPES.get(str(kind), str(kind))), *map(_numbers, chunks)])


def _numbers(chunk: pa.Array) -> NDArray[Any]:
    return np.from_dlpack(chunk)
