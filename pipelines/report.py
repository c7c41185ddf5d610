"""Print one Markdown table of evaluations: the teacher, and every kind of student as the mean over its seeds.

    python pipelines/report.py evaluation.json --retained top1_accuracy
    python pipelines/report.py pairs.json search.json --retained spearman --numbers spearman,ndcg_at_10

Reads what ``kdcache evaluate --json`` writes; of several files, a model's numbers are put together. Students are called
KIND-seedN, any other student is the teacher, run as a student for what the cache does not hold, such as its speed.
Behind a mean stands the standard deviation over the seeds; ``retained`` is a student's share of the teacher's number of
that name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

LEFT_OUT = ("model", "num_parameters", "warnings", "metrics")
TEACHER = "teacher"

Numbers = dict[str, float]


def kind_of(name: str) -> str:
    """Return the kind of student that a directory holds, or that it is the teacher."""
    return Path(name).name.rpartition("-seed")[0] or TEACHER


def numbers(row: dict[str, Any]) -> Numbers:
    """Return all known numbers of a model by name."""
    return {n: value for n, value in {**row, **row["metrics"]}.items() if n not in LEFT_OUT and value is not None}


def read(paths: list[Path]) -> tuple[dict[str, list[Numbers]], dict[str, int]]:
    """Return the numbers of every model by kind, and how many parameters the kinds have."""
    models: dict[str, Numbers] = {}
    sizes: dict[str, int] = {}
    for path in paths:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        for row in (evaluation["teacher"] | {"model": TEACHER}, *evaluation["students"]):
            kind = kind_of(row["model"])
            name = TEACHER if kind == TEACHER else row["model"]
            models[name] = numbers(row) | models.get(name, {})
            sizes.setdefault(kind, row["num_parameters"])
    kinds: dict[str, list[Numbers]] = {}
    for name, found in models.items():
        kinds.setdefault(kind_of(name), []).append(found)
    return kinds, sizes


def cell(rows: list[Numbers], name: str) -> str:
    """Return the mean of a number over some rows, and how far it spreads; a dash where it is unknown."""
    known = [row[name] for row in rows if name in row]
    if not known:
        return "-"
    form = ",.0f" if max(known) >= 1000 else ".1f" if max(known) >= 10 else ".4f"
    return f"{mean(known):{form}}" + (f" ± {stdev(known):{form}}" if len(known) > 1 and form != ",.0f" else "")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluations", nargs="+", type=Path)
    parser.add_argument("--retained", required=True, metavar="NUMBER", help="what a student's share is of")
    parser.add_argument("--numbers", metavar="NAME,NAME,...", help="columns (default: all that are known)")
    options = parser.parse_args()
    kinds, sizes = read(options.evaluations)
    every = dict.fromkeys(name for rows in kinds.values() for row in rows for name in row)
    shown = options.numbers.split(",") if options.numbers else list(every)
    headings = ("model", "parameters", *(name.replace("_", " ") for name in shown), "retained")
    print(f"| {' | '.join(headings)} |\n| :-- {'| --: ' * (len(headings) - 1)}|")
    best = kinds[TEACHER][0][options.retained]
    for kind, rows in kinds.items():
        share = mean(row[options.retained] for row in rows) / best
        cells = [kind, f"{sizes[kind]:,}", *(cell(rows, name) for name in shown), f"{share:.1%}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
