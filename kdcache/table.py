"""Render rows as an aligned text table or in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.terminal import one_line


def render_table(columns: Mapping[str, tuple[str, str]], rows: Sequence[Any], *, markdown: bool = False) -> str:
    """Return ``rows`` as a table. ``columns`` maps attributes of a row to (heading, format specification).

    Format ``s`` is for text, which is aligned left; numbers are aligned right. None is shown as ``-``. A column in
    which every value is None is left out.
    """
    shown = {name: column for name, column in columns.items() if any(getattr(row, name) is not None for row in rows)}
    cells = [[heading for heading, _ in shown.values()]]
    cells += [[_cell(getattr(row, name), form) for name, (_, form) in shown.items()] for row in rows]
    left = [form == "s" for _, form in shown.values()]
    if markdown:
        rule = [":--" if is_left else "--:" for is_left in left]
        return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(_aligned(line, widths, left) for line in cells)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else one_line(format(value, form))


def _aligned(line: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> str:
    pieces = [
        cell.ljust(width) if is_left else cell.rjust(width)
        for cell, width, is_left in zip(line, widths, left, strict=True)
    ]
    return "  ".join(pieces).rstrip()
