"""Labels of a corpus as numbers: classes by number or name, or plain numbers.

A column may name its classes (``ClassLabel`` of HF datasets). If these are the teacher's classes, in any order, names
are used, not numbers.

Null and NaN mean no label; so does -1 for classes, as in GLUE and SNLI. A number that is ambiguous, because one class
has it as its name and another as its number, is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.readers import NamedClass
from kdcache.errors import CorpusError, did_you_mean
from kdcache.schema import NO_LABEL


def class_label(value: Any, names: Sequence[str], document: str) -> int:
    """Return the number of the class ``value`` (a name or a number); `NO_LABEL` for no label.

    Raises ``CorpusError``, naming the ``document``, for a class that the teacher does not have.
    """
    if _is_missing(value):
        return NO_LABEL
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, NamedClass) and 0 <= value < len(value.names):
        by_name = _numbers_by_name(value.names, tuple(names))
        if by_name is not None:
            return by_name[value]
    number = _whole(value)
    if number == NO_LABEL:
        return NO_LABEL
    if number is None or not 0 <= number < len(names):
        hint = did_you_mean(value, names) if isinstance(value, str) else f"it has 0 to {len(names) - 1}"
        raise CorpusError(f"{document}: the teacher has no class {value!r}, {hint}")
    if str(number) in names and names[number] != str(number):
        raise CorpusError(
            f"{document}: the label {value!r} is ambiguous: it is the name of one class, and the number of class "
            f"{names[number]!r}; write labels as names, as strings"
        )
    return number


def number_label(value: Any, document: str) -> float:
    """Return ``value`` as a float, NaN for no label; raises ``CorpusError`` for anything else and for infinity."""
    if _is_missing(value):
        return math.nan
    try:
        with np.errstate(over="ignore"):
            number = float(np.float32(value))
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise CorpusError(f"{document}: expected a number as label, found {value!r}")
    return number


def classes(values: list[int]) -> NDArray[np.int64]:
    """Return classes as an array of a `Sequence`."""
    return np.array(values, np.int64)


def numbers(values: list[float]) -> NDArray[np.float32]:
    """Return numbers as an array of a `Sequence`."""
    return np.array(values, np.float32)


@lru_cache
def _numbers_by_name(corpus_names: tuple[str, ...], names: tuple[str, ...]) -> list[int] | None:
    """Return the teacher's number of each class of the corpus; None if the names differ, or have the same numbers.

    Raises ``CorpusError`` if some names are equal and have other numbers: then neither names nor numbers are reliable.
    """
    numbers = {name.casefold(): number for number, name in enumerate(names)}
    found = [numbers.get(name.casefold()) for name in corpus_names]
    known = [number for number in found if number is not None]
    if len(known) == len(found):
        return known
    if all(number in (None, index) for index, number in enumerate(found)):
        return None
    raise CorpusError(
        f"the corpus has the classes {', '.join(corpus_names)} and the teacher {', '.join(names)}: some names are "
        "equal but have other numbers; write the labels as the teacher's names, as strings"
    )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> int | None:
    """Return ``value`` as an integer; None for anything else, such as true and false."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?[0-9]+", value) else None
    return int(value) if isinstance(value, int | float) and float(value).is_integer() else None
