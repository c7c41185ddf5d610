"""A cache as a Hugging Face data set: an Arrow file that is written once and mapped into memory from then on.

The file is named after everything that decides its content (the cache's fingerprint, the sequences, the fields, K) and
is in the cache directory of the ``datasets`` library: asking for the same again costs nothing, and another cache at the
same path is another file. It is written whole before it gets its name.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from kdcache.cache import layout
from kdcache.cache.arrow import chosen_rows, to_arrow_reader
from kdcache.cache.reader import Cache

if TYPE_CHECKING:
    from datasets import Dataset

#: Goes up when rows change their form.
_VERSION = 1


def to_hf_dataset(
    cache: Cache,
    indices: Iterable[int] | None = None,
    *,
    fields: Iterable[str] = (),
    top_k: int | None = None,
    directory: str | Path | None = None,
) -> Dataset:
    """Return sequences of a cache (default: all) as a ``datasets.Dataset``; columns are those of `to_arrow_reader`.

    The decoded rows are written to an Arrow file in ``directory`` (default: ``kdcache`` in the cache directory of
    ``datasets``), about 8 bytes per kept id, unless it is there already; memory stays bounded. Raises ``CacheError``
    for sequences, fields or a ``top_k`` that the cache does not have.
    """
    import datasets  # imported here, since it takes a second

    rows_N = chosen_rows(cache, indices)
    names = list(fields)
    identity = [_VERSION, cache.fingerprint, layout.sha256(rows_N.tobytes()), names, top_k]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "kdcache" if directory is None else Path(directory)
    file = folder / f"{layout.sha256(layout.canonical_json(identity))[:32]}.arrow"
    if not file.exists():
        _write(to_arrow_reader(cache, rows_N.tolist(), fields=names, top_k=top_k), file)
    return cast("Dataset", datasets.Dataset.from_file(str(file)))


def _write(reader: pa.RecordBatchReader, file: Path) -> None:
    """Write a stream of record batches to ``file``, which exists only when it is complete."""
    import datasets

    schema = datasets.Features.from_arrow_schema(reader.schema).arrow_schema
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in reader:
                writer.write_batch(batch.cast(schema))
        os.replace(name, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
