"""Types of columns from their values: what was written as a string stays a string, and as a number a number.

A type is decided from all rows of a file, never from its beginning, and never from what a string looks like. Integers
and decimal numbers in one column are float64 where that is exact. Other values of several kinds in one column have no
common type: such a column is `MIXED`, and its values are kept as they are. Kinds and widths follow pyarrow's JSON
reader, so columns of one kind have the types that they had before kdcache read JSON itself.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

#: The type of a column whose values have no common type: JSON texts, and strings as they are.
MIXED = pa.string()

_EXACT_FLOAT = 1 << 53
_SCALARS: dict[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


class ColumnType:
    """The kinds of all values that were `add`\\ ed."""

    __slots__ = ("_fields", "_is_huge", "_is_wide", "_item", "kinds")

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self._is_wide = self._is_huge = False
        self._item: ColumnType | None = None
        self._fields: dict[str, ColumnType] = {}

    def add(self, value: Any) -> None:
        """Take a value of JSON into account."""
        if value is None:
            return
        kind = type(value)
        self.kinds.add(kind)
        if kind is int:
            self._is_wide = self._is_wide or not -_EXACT_FLOAT <= value <= _EXACT_FLOAT
            self._is_huge = self._is_huge or not -(1 << 63) <= value < 1 << 63
        elif kind is list:
            self._item = self._item or ColumnType()
            for item in value:
                self._item.add(item)
        elif kind is dict:
            for name, item in value.items():
                if name not in self._fields:
                    self._fields[name] = ColumnType()
                self._fields[name].add(item)

    def arrow(self) -> pa.DataType | None:
        """Return the type of the column, None if the values have no common type."""
        if self._is_huge:
            return None
        if self.kinds == {int, float} and not self._is_wide:
            return pa.float64()
        if len(self.kinds) != 1:
            return None if self.kinds else pa.null()
        [kind] = self.kinds
        if kind is list:
            item = self._item.arrow() if self._item else pa.null()
            return None if item is None else pa.list_(item)
        if kind is dict:
            fields = [(name, field.arrow()) for name, field in self._fields.items()]
            # An object without members has no type that every format of tables can store.
            is_known = fields and all(type_ is not None for _, type_ in fields)
            return pa.struct(fields) if is_known else None
        return _SCALARS[kind]


def as_text(value: Any) -> str | None:
    """Return a value of a `MIXED` column: None and strings as they are, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
