"""Put the evaluations of all seeds into one table: the mean over the seeds of a kind of student, and its spread.

    python pipelines/embedding/report.py sts.json search.json

Students are directories called KIND-seedN. The percentage is the share of the teacher's value that a student keeps.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

METRICS = {
    "spearman": "STS-B Spearman",
    "ndcg_at_10": "nDCG@10",
    "recall_at_10": "recall@10",
    "recall_at_100": "recall@100",
    "mrr_at_10": "MRR@10",
    "teacher_cosine": "cosine to the teacher",
}


def kinds_of(evaluations: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the values of every metric of every kind of student; the first evaluation that has a metric counts."""
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name in METRICS:
        evaluation = next(e for e in evaluations if name in e["students"][0]["metrics"])
        for row in evaluation["students"]:
            kind = Path(row["model"]).name.rpartition("-seed")[0]
            value = row["metrics"][name]
            if value is not None:
                found[kind].setdefault(name, []).append(value)
    return found


def cell(values: list[float], teacher: float | None) -> str:
    """Return the mean of some values, their spread if there are several, and the share of the teacher's."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    share = f" ({mean / teacher:.1%})" if teacher else ""
    return f"{mean:.4f}{spread}{share}"


def main() -> None:
    """Print the table in Markdown."""
    evaluations = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    teacher = {name: value for e in evaluations for name, value in e["teacher"]["metrics"].items()}
    sizes = {Path(r["model"]).name.rpartition("-seed")[0]: r["num_parameters"] for r in evaluations[0]["students"]}
    print("| model | parameters | " + " | ".join(METRICS.values()) + " |")
    print("| :-- " + "| --: " * (len(METRICS) + 1) + "|")
    own = [f"{teacher[name]:.4f}" if name in teacher else "-" for name in METRICS]
    print(f"| teacher | {evaluations[0]['teacher']['num_parameters']:,} | " + " | ".join(own) + " |")
    for kind, metrics in kinds_of(evaluations).items():
        cells = [cell(metrics.get(name, []), teacher.get(name)) for name in METRICS]
        print(f"| {kind} | {sizes[kind]:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
