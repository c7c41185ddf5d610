"""Labels of a corpus as numbers: classes by number or name, or numbers as they are.

A column may say itself what its numbers are called (``ClassLabel`` of HF datasets). Where these are the teacher's
classes, in whatever order, it is the names that count.

Null and NaN are no label; so is -1 among classes, which is how GLUE and SNLI write it. A number that could mean two
classes, because one is called like it and another has that number, is refused and not guessed.
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
    """Return the number of the class that ``value`` names (a name, or its number); `NO_LABEL` for none.

    Raises ``CorpusError``, saying which ``document``, for a class that the teacher does not have.
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
            f"{document}: the label {value!r} may be the class called {str(number)!r} or class number {number}, which "
            f"is called {names[number]!r}; write labels as names, which are strings"
        )
    return number


def number_label(value: Any, document: str) -> float:
    """Return ``value`` as a number, NaN for none; raises ``CorpusError`` for what is none or has no end."""
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
    """Return classes as a `Sequence` holds them."""
    return np.array(values, np.int64)


def numbers(values: list[float]) -> NDArray[np.float32]:
    """Return numbers as a `Sequence` holds them."""
    return np.array(values, np.float32)


@lru_cache
def _numbers_by_name(corpus_names: tuple[str, ...], names: tuple[str, ...]) -> list[int] | None:
    """Return the teacher's number of each of the corpus's classes; None where their names are others or in one order.

    Raises ``CorpusError`` where some are called alike and have other numbers: neither names nor numbers are right then.
    """
    numbers = {name.casefold(): number for number, name in enumerate(names)}
    found = [numbers.get(name.casefold()) for name in corpus_names]
    known = [number for number in found if number is not None]
    if len(known) == len(found):
        return known
    if all(number in (None, place) for place, number in enumerate(found)):
        return None
    raise CorpusError(
        f"the corpus calls its classes {', '.join(corpus_names)} and the teacher {', '.join(names)}, some alike and "
        "under other numbers; write the labels as the teacher's names, which are strings"
    )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> int | None:
    """Return ``value`` as a whole number; None for what is none, such as true and false."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?[0-9]+", value) else None
    return int(value) if isinstance(value, int | float) and float(value).is_integer() else None
