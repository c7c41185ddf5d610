"""One source of documents, whatever its format: the interface that the formats implement and the corpus reads.

A reader is opened once and then only asked for ranges of rows. It never holds the texts: text files are read where
they lie, tables are memory-mapped by HF datasets, so a corpus may be larger than memory. A single document may not:
it is read and tokenised whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

#: Key of a field's metadata under which the names of its classes stand, as a JSON list.
CLASS_NAMES = b"class_names"


class NamedClass(int):
    """A class of a column that says what its numbers are called: the number, and ``names`` of all."""

    names: tuple[str, ...]

    def __new__(cls, number: int, names: tuple[str, ...]) -> NamedClass:
        """Return the class ``number`` of ``names``."""
        value = super().__new__(cls, number)
        value.names = names
        return value


class Reader(Protocol):
    """Rows of one file or of one hub data set; ``name`` is how messages call it."""

    name: str
    num_rows: int
    #: True if the source is one document, whose id then needs no row number.
    is_single: bool

    @property
    def metadata_schema(self) -> pa.Schema:
        """Columns besides the text, with the types of the source; those of classes with `CLASS_NAMES`."""
        ...

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``; null texts are empty."""
        ...

    def num_missing(self, stop: int) -> int:
        """Return how many of the first ``stop`` rows have no text at all (null or missing), without reading texts."""
        ...

    def metadata(self, rows: Sequence[int]) -> pa.Table:
        """Return the columns of `metadata_schema` for ``rows``."""
        ...


def no_columns(num_rows: int) -> pa.Table:
    """Return a table of ``num_rows`` rows without columns."""
    return pa.table({"row": pa.nulls(num_rows)}).select([])
