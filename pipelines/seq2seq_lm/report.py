"""Print one Markdown table of an evaluation: the teacher, and every kind of student as the mean over its seeds.

    python pipelines/seq2seq_lm/report.py evaluation.json

Reads what ``kdcache evaluate --generate N --json`` writes. The first student is the teacher, the others are called
KIND-seedN. ``retained`` is a student's chrF as a share of the teacher's; behind a mean stands the standard deviation
over the seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

COLUMNS = {
    "loss": ("loss", ".3f"),
    "kl": ("KL", ".3f"),
    "agreement": ("agreement", ".3f"),
    "chrf": ("chrF", ".1f"),
    "rouge_l": ("ROUGE-L", ".1f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
}


def values(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Return the known values of a number over some rows."""
    found = [row["metrics"].get(name, row.get(name)) for row in rows]
    return [value for value in found if value is not None]


def cell(rows: list[dict[str, Any]], name: str) -> str:
    """Return the mean of a number over some rows, and how far it spreads; a dash where it is unknown."""
    form, known = COLUMNS[name][1], values(rows, name)
    if not known:
        return "-"
    return f"{mean(known):{form}}" + (f" ± {stdev(known):{form}}" if len(known) > 1 else "")


def main() -> None:
    """Print the table."""
    evaluation = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    teacher, *students = evaluation["students"]
    kinds: dict[str, list[dict[str, Any]]] = {"teacher": [teacher]}
    for row in students:
        kinds.setdefault(Path(row["model"]).name.rpartition("-seed")[0], []).append(row)
    best = teacher["metrics"]["chrf"]
    headings = ["model", "parameters", *(heading for heading, _ in COLUMNS.values()), "retained"]
    print(f"| {' | '.join(headings)} |")
    print(f"| :-- {'| --: ' * (len(headings) - 1)}|")
    for name, rows in kinds.items():
        retained = f"{mean(values(rows, 'chrf')) / best:.1%}" if best else "-"
        cells = [name, f"{rows[0]['num_parameters']:,}", *(cell(rows, column) for column in COLUMNS), retained]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{evaluation['num_sequences']} papers, {evaluation['num_targets']:,} tokens of titles.")


if __name__ == "__main__":
    main()
