"""Columns become the arrays that pyarrow's own conversion gives, without pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa

from kdcache.cache.columns import as_numpy

COLUMNS = {
    "integers": pa.chunked_array([pa.array([1, 2], pa.int32()), pa.array([], pa.int32()), pa.array([3], pa.int32())]),
    "unsigned": pa.array([1, 2**63], pa.uint64()),
    "floats": pa.array([1.5, float("nan")], pa.float32()),
    "sliced": pa.chunked_array([pa.array(range(10))]).slice(3, 4),
    "booleans": pa.chunked_array([[True, False, True], [False]]),
    "nulls": pa.chunked_array([[1.5, None]]),
    "integers with nulls": pa.array([1, None]),
    "none": pa.chunked_array([], pa.int64()),
    "texts": pa.array(["a", "b"]),
}


def test_equal_to_the_conversion_of_pyarrow():
    for name, column in COLUMNS.items():
        found, expected = as_numpy(column), np.asarray(column)
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_reading_batches_does_not_import_pandas(sound):
    code = (
        "import sys; from kdcache.cache import open_cache; cache = open_cache(sys.argv[1]);"
        "cache.sizes_N, cache.lengths_N, next(iter(cache.batches(2)));"
        "assert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(sound)], check=True)
