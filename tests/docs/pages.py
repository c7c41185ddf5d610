"""The pages that people read, and what the tests take out of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page: str, *languages: str) -> list[str]:
    """Return the fenced blocks of ``page`` in one of ``languages``."""
    return [match[3] for match in _BLOCK.finditer(page) if match[2] in languages]


def sections(page: str) -> dict[str, str]:
    """Return the text below every heading, up to the next one of any level."""
    prose = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), page)
    parts = re.split(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(section: str) -> dict[str, list[str]]:
    """Return the table rows of ``section`` whose first cell is a `name`, as name -> other cells."""
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        name = re.fullmatch(r"`([\w<>-]+)`", cells[0])
        if line.startswith("|") and name:
            assert name[1] not in found, f"{name[1]} stands twice in a table"
            found[name[1]] = cells[1:]
    return found
