"""The interface of a source of documents, which every file format implements.

A reader is opened once and then asked for ranges of rows. It does not hold the texts: text files are read in place, and
HF datasets memory-maps tables. So a corpus may be larger than memory, but not a single document, which is read and
tokenised whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

#: Metadata key of a field for the names of its classes, a JSON list.
CLASS_NAMES = b"class_names"


class NamedClass(int):
    """A class number from a column that names its classes; ``names`` are those of all classes."""

    names: tuple[str, ...]

    def __new__(cls, number: int, names: tuple[str, ...]) -> NamedClass:
        """Return the class ``number`` of ``names``."""
        value = super().__new__(cls, number)
        value.names = names
        return value


class Reader(Protocol):
    """Rows of one file or of one hub data set; ``name`` is its name in messages."""

    name: str
    num_rows: int
    #: True if the source is one document, whose id then needs no row number.
    is_single: bool

    @property
    def metadata_schema(self) -> pa.Schema:
        """Columns other than the text, with the types of the source; columns of classes have `CLASS_NAMES`."""
        ...

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``; null texts are empty."""
        ...

    def num_missing(self, stop: int) -> int:
        """Return how many of the first ``stop`` rows have a null or missing text, without reading texts."""
        ...

    def metadata(self, rows: Sequence[int]) -> pa.Table:
        """Return the columns of `metadata_schema` for ``rows``."""
        ...


def no_columns(num_rows: int) -> pa.Table:
    """Return a table of ``num_rows`` rows without columns."""
    return pa.table({"row": pa.nulls(num_rows)}).select([])
