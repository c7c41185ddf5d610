"""Counts with their nouns, and that no count is shown with a noun that is made otherwise."""

from __future__ import annotations

import re
from pathlib import Path

import kdcache
from kdcache.words import are, count, plural


def test_one_and_many():
    assert [count(n, "shard") for n in (0, 1, 2, 1200)] == ["0 shards", "1 shard", "2 shards", "1,200 shards"]
    assert count(1, "query", of=3) == "1 of 3 queries"
    assert count(0, "file", of=1) == "0 of 1 file"
    assert count(2, "optimiser step") == "2 optimiser steps"
    assert [count(x, "epoch") for x in (0.5, 1.0, 2.0)] == ["0.5 epochs", "1 epoch", "2 epochs"]
    assert [plural(noun) for noun in ("process", "class", "batch", "index")] == [
        "processes",
        "classes",
        "batches",
        "indexes",
    ]
    assert [are(n) for n in (0, 1, 2)] == ["are", "is", "are"]


def test_commands_show_no_count_with_a_fixed_plural():
    """A number in braces and then a plural, as in ``{n:,} shards``; rates such as tokens/s are always plural."""
    nouns = "shards|files|problems|steps|sequences|documents|positions|lines|students|parameters|texts"
    fixed = re.compile(rf"\{{[^{{}}]*\}} (?:{nouns})\b(?!/)")
    folder = Path(kdcache.__file__).parent / "cli"
    modules = sorted(folder.glob("*.py"))
    assert len(modules) > 10
    found = [f"{path.name}: {match[0]}" for path in modules for match in fixed.finditer(path.read_text())]
    assert not found
