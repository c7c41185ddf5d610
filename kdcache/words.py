"""Words of results and messages: counts with their nouns.

"1 shards" looks like a mistake in the number. So every count that is shown with a noun is made here.
"""

from __future__ import annotations

#: Nouns whose plural is not made by a rule.
_PLURALS = {"query": "queries", "entry": "entries", "directory": "directories", "class": "classes", "epoch": "epochs"}


def count(number: float, noun: str, of: int | None = None) -> str:
    """Return a number with its noun: ``1 shard``, ``1,200 sequences``, ``1 of 3 files`` with a total ``of``.

    The last word of ``noun`` takes the plural: ``optimiser step`` becomes ``optimiser steps``. A number that is not
    whole takes it too: ``0.5 epochs``.
    """
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    words = noun if (number if of is None else of) == 1 else plural(noun)
    return f"{shown} {words}" if of is None else f"{shown} of {of:,} {words}"


def are(number: int) -> str:
    """Return ``is`` for one, ``are`` for all other numbers."""
    return "is" if number == 1 else "are"


def plural(noun: str) -> str:
    """Return the plural of a noun, or of a phrase that ends with one."""
    *before, last = noun.split(" ")
    ending = "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return " ".join([*before, _PLURALS.get(last, last + ending)])
