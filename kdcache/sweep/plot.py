"""Plot a sweep: the quality of every variation, best first, and quality against those costs that differ.

Names are long and there may be fifty of them, so they stand where they cannot touch: one to a line, beside their
quality. In the panels of costs a point has the number of that line. Where points lie so close that there is no room for
a number, it is left out. A cost that is the same for all variations, such as the parameters where only the learning
rate varies, has no panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.sweep.table import SweepRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

#: Name of a cost -> title of its axis, unit of its numbers.
_PANELS = {
    "num_parameters": ("parameters", ""),
    "num_bytes": ("size of the weights", "B"),
    "seconds": ("time of training", "s"),
}
#: Costs whose largest is less than this times the smallest count as equal.
_LEAST_RATIO = 1.05
#: From this ratio on an axis is logarithmic.
_LOG_RATIO = 5.0
#: Letters of a name that are shown.
_LONGEST_NAME = 60
#: Inches: of a line of the list, of margins and axis, and the least and most of the height of a panel of costs.
_LINE, _MARGINS, _LEAST_HEIGHT, _MOST_HEIGHT = 0.24, 1.0, 4.0, 6.0
_LIST_WIDTH, _PANEL_WIDTH = 7.5, 4.5
#: Where a number may stand, in points from the middle of its point: near places first.
_PLACES = [
    (distance * np.cos(angle), distance * np.sin(angle))
    for distance in (9, 13, 18)
    for angle in np.deg2rad([45, 0, 90, 135, 315, 180, 270, 225])
]


def write_plot(path: Path, rows: Sequence[SweepRow], quality: str) -> bool:
    """Draw the finished variations, which are sorted, into ``path``; ``quality`` names what they are sorted by.

    Returns False, having done nothing, where matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    draw([row for row in rows if row.quality is not None], quality).savefig(path, dpi=120)
    return True


def draw(rows: Sequence[SweepRow], quality: str) -> Figure:
    """Return the figure of ``rows``, which have a quality and are sorted by it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = [key for key in _PANELS if _differs(rows, key)]
    height = max(_LINE * len(rows) + _MARGINS, _LEAST_HEIGHT)
    is_stacked = height > _MOST_HEIGHT and len(keys) > 1
    num_columns, num_lines = (1, len(keys)) if is_stacked else (len(keys), 1)
    height = max(height, num_lines * _LEAST_HEIGHT)
    figure = Figure(figsize=(_LIST_WIDTH + num_columns * _PANEL_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [_LIST_WIDTH, *[_PANEL_WIDTH] * num_columns]
    grid = figure.add_gridspec(num_lines, 1 + num_columns, width_ratios=ratios)
    title = quality + (" (nats per position)" if quality.endswith(("loss", "kl")) else "")
    _draw_list(figure.add_subplot(grid[:, 0]), rows, title)
    panels = [
        (_draw_costs(figure.add_subplot(grid[n, 1] if is_stacked else grid[0, 1 + n]), rows, key, title), key)
        for n, key in enumerate(keys)
    ]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # numbers must not move what they are placed by
    for axes, key in panels:
        _number(axes, rows, key)
    return figure


def _differs(rows: Sequence[SweepRow], key: str) -> bool:
    values = _known(rows, key)
    return len(values) > 1 and min(values) > 0 and max(values) / min(values) >= _LEAST_RATIO


def _known(rows: Sequence[SweepRow], key: str) -> list[float]:
    return [cost.mean for row in rows if (cost := row.costs[key]) is not None]


def _draw_list(axes: Any, rows: Sequence[SweepRow], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for line, row in enumerate(rows):
        assert row.quality is not None
        axes.errorbar(row.quality.mean, line, xerr=row.quality.half_width, fmt="o", color="C0", capsize=3)
    axes.set_yticks(range(len(rows)), [f"{_short(row.name)}  {line}" for line, row in enumerate(rows, 1)], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(title)
    axes.grid(alpha=0.3)


def _short(name: str) -> str:
    half = _LONGEST_NAME // 2 - 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]} ... {name[-half:]}"


def _draw_costs(axes: Any, rows: Sequence[SweepRow], key: str, title: str) -> Any:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    name, unit = _PANELS[key]
    for _, cost, quality in _points(rows, key):
        axes.errorbar(cost, quality.mean, yerr=quality.half_width, fmt="o", color="C0", capsize=3)
    values = _known(rows, key)
    ratio = max(values) / min(values)
    if ratio >= _LOG_RATIO:
        axes.set_xscale("log")
        subs = (1, 2, 5) if ratio < 20 else (1, 3) if ratio < 200 else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    # A thousand seconds are not called 1 ks.
    axes.xaxis.set_major_formatter("{x:,.6g} s" if unit == "s" else EngFormatter(unit))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.margins(0.12)
    axes.set_xlabel(name)
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    return axes


def _points(rows: Sequence[SweepRow], key: str) -> Iterator[tuple[int, float, Any]]:
    """Yield the number, the cost and the quality of every variation that has both."""
    for number, row in enumerate(rows, 1):
        cost = row.costs[key]
        if cost is not None and row.quality is not None:
            yield number, cost.mean, row.quality


def _number(axes: Any, rows: Sequence[SweepRow], key: str) -> None:
    """Write numbers beside the points, each at the first place where it touches no point and no other number."""
    from matplotlib.transforms import Bbox

    renderer, points = axes.figure.canvas.get_renderer(), list(_points(rows, key))
    centres = axes.transData.transform([(cost, quality.mean) for _, cost, quality in points])
    radius = 4 * axes.figure.dpi / 72
    taken: list[Bbox] = [Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in centres]
    for number, cost, quality in points:
        for place in _PLACES:
            label = axes.annotate(
                str(number),
                (cost, quality.mean),
                place,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=7,
            )
            box = label.get_window_extent(renderer)
            if _is_inside(axes.bbox, box) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _is_inside(frame: Bbox, box: Bbox) -> bool:
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
