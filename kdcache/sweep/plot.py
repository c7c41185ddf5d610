"""Plot a sweep: quality against cost, in parameters, bytes and seconds of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.sweep.table import SweepRow

_PANELS = {"num_parameters": "parameters", "num_bytes": "bytes of weights", "seconds": "seconds of training"}
#: With more students than this, names would cover the points.
_MOST_NAMES = 16


def write_plot(path: Path, rows: Sequence[SweepRow], quality: str) -> bool:
    """Draw the finished variations into ``path``; ``quality`` names the vertical axis.

    Returns False, having done nothing, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    finished = [row for row in rows if row.quality is not None]
    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(_PANELS), sharey=True), _PANELS.items(), strict=True):
        _draw(axes, key, finished)
        axes.set_xlabel(title)
    unit = " (nats per position)" if quality.endswith(("loss", "kl")) else ""
    figure.axes[0].set_ylabel(quality + unit)
    figure.savefig(path, dpi=120)
    return True


def _draw(axes: Any, key: str, rows: Sequence[SweepRow]) -> None:
    for row in rows:
        cost, quality = row.costs[key], row.quality
        if cost is None or quality is None:
            continue
        axes.errorbar(cost.mean, quality.mean, yerr=quality.half_width, fmt="o", capsize=3)
        if len(rows) <= _MOST_NAMES:
            axes.annotate(row.name, (cost.mean, quality.mean), (4, 4), textcoords="offset points", fontsize=7)
    if any(row.costs[key] is not None for row in rows):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
