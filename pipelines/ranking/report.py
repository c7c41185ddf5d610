"""Print one Markdown table of an evaluation: the teacher, and every kind of student as the mean over its seeds.

    python pipelines/ranking/report.py evaluation.json

Reads what ``kdcache evaluate --json`` writes. Students are called KIND-seedN. ``retained`` is a student's nDCG@10 as a
share of the teacher's; behind a mean stands the standard deviation over the seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

METRICS = ("ndcg_at_10", "mrr_at_10", "hit_at_1", "teacher_spearman", "teacher_top1")


def cell(rows: list[dict[str, Any]], metric: str) -> str:
    """Return the mean of a metric over some rows, and how far it spreads; nothing where it is unknown."""
    values = [row["metrics"].get(metric) for row in rows]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{mean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def main() -> None:
    """Print the table."""
    evaluation = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    kinds: dict[str, list[dict[str, Any]]] = {evaluation["teacher"]["model"]: [evaluation["teacher"]]}
    for row in evaluation["students"]:
        kinds.setdefault(Path(row["model"]).name.rpartition("-seed")[0], []).append(row)
    best = evaluation["teacher"]["metrics"]["ndcg_at_10"]
    columns = ("model", "parameters", *(name.replace("_", " ") for name in METRICS), "retained")
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for name, rows in kinds.items():
        share = mean(row["metrics"]["ndcg_at_10"] for row in rows) / best if best else 0.0
        cells = [name, f"{rows[0]['num_parameters']:,}", *(cell(rows, metric) for metric in METRICS), f"{share:.1%}"]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{evaluation['num_sequences']} queries, {evaluation['num_targets']} documents.")


if __name__ == "__main__":
    main()
