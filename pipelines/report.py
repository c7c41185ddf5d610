"""Print one Markdown table of an evaluation: the teacher, and every kind of student as the mean over its seeds.

    python pipelines/report.py evaluation.json --retained top1_accuracy

Reads what ``kdcache evaluate --json`` writes. Students are called KIND-seedN. Behind a mean stands the standard
deviation over the seeds; ``retained`` is a student's share of the teacher's number of that name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

LEFT_OUT = ("model", "num_parameters", "warnings", "metrics")


def numbers(row: dict[str, Any]) -> dict[str, float | None]:
    """Return all numbers of a model by name."""
    return {name: value for name, value in {**row, **row["metrics"]}.items() if name not in LEFT_OUT}


def cell(rows: list[dict[str, Any]], name: str) -> str:
    """Return the mean of a number over some rows, and how far it spreads; nothing where it is unknown."""
    known = [value for value in (numbers(row).get(name) for row in rows) if value is not None]
    if not known:
        return ""
    if max(known) >= 1000:  # bytes, tokens per second
        return f"{mean(known):,.0f}"
    return f"{mean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--retained", required=True, metavar="NUMBER", help="what a student's share is of")
    options = parser.parse_args()
    evaluation = json.loads(options.evaluation.read_text(encoding="utf-8"))
    kinds: dict[str, list[dict[str, Any]]] = {evaluation["teacher"]["model"]: [evaluation["teacher"]]}
    for row in evaluation["students"]:
        kinds.setdefault(Path(row["model"]).name.rpartition("-seed")[0], []).append(row)
    shown = dict.fromkeys(name for rows in kinds.values() for row in rows for name, n in numbers(row).items() if n)
    best = numbers(evaluation["teacher"])[options.retained]
    columns = ("model", "parameters", *(name.replace("_", " ") for name in shown), "retained")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, rows in kinds.items():
        share = mean(numbers(row)[options.retained] or 0.0 for row in rows) / best if best else 0.0
        cells = [name, f"{rows[0]['num_parameters']:,}", *(cell(rows, column) for column in shown), f"{share:.1%}"]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{evaluation['num_sequences']} sequences, {evaluation['num_targets']} rows.")


if __name__ == "__main__":
    main()
