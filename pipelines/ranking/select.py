"""Keep a few documents of every query: the relevant ones, and the first others.

    python pipelines/ranking/select.py train.jsonl OUTPUT.jsonl --documents 8 [--queries 30]

Students learn from fewer candidates than there are, because a teacher's time is in proportion to them. Taking the first
ones as they come would leave many queries without a relevant document, and so the student without distillation without
a loss. The order of the documents stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def few(row: dict[str, Any], most: int) -> dict[str, Any]:
    """Return the row with at most ``most`` documents; every list as long as that of the documents is cut alike."""
    relevance = row["relevance"]
    by_worth = sorted(range(len(relevance)), key=lambda n: -(relevance[n] or 0))
    chosen, count = sorted(by_worth[:most]), len(row["documents"])

    def cut(value: Any) -> Any:
        return [value[n] for n in chosen] if isinstance(value, list) and len(value) == count else value

    return {name: cut(value) for name, value in row.items()}


def main() -> None:
    """Read, cut and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--documents", type=int, default=8, help="most documents of a query")
    parser.add_argument("--queries", type=int, help="only the first queries")
    arguments = parser.parse_args()
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()[: arguments.queries]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("".join(json.dumps(few(json.loads(x), arguments.documents)) + "\n" for x in lines))


if __name__ == "__main__":
    main()
