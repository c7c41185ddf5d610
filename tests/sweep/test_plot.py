"""The picture of a sweep can be read: no label touches another one or leaves the picture, whatever is drawn."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from kdcache.sweep.plot import draw, write_plot
from kdcache.sweep.table import SweepEstimate, SweepRow

matplotlib = pytest.importorskip("matplotlib")

LONG = (
    "objective.forward_kl.temperature={},objective.cross_entropy.weight=0.25,student.config_file=configs,of,students,{}"
)
#: Members, parameters of the sizes, and what names are made of.
PICTURES = {
    "4 of one size": (4, [2.1e6], "learning_rate=0.0005,temperature={}"),
    "4 of several": (4, [1e6, 3e6, 8e7], "learning_rate=0.0005,temperature={}"),
    "12 of several, long names": (12, [1e6, 1.3e6], LONG),
    "16 that are equal": (16, [2e6], "seed={}"),
    "50 of one size": (50, [2.1e6], "learning_rate=0.0005,temperature={}"),
    "50 of several, long names": (50, [1e6, 3e6, 9e6, 6e7, 3e8], LONG),
}


def rows_of(count: int, sizes: list[float], name: str) -> list[SweepRow]:
    """Members of a sweep; of ``seed=`` all are equally good."""
    drawn, rows = np.random.default_rng(count), []
    for number in range(count):
        size = sizes[number % len(sizes)]
        loss = SweepEstimate(3.0 if name.startswith("seed") else 3 + drawn.random(), 0.02 if number % 3 else None)
        seconds = 4.83 + 0.3 * drawn.random() if len(sizes) == 1 else size / 1e5 * (1 + drawn.random() / 10)
        costs = {"num_parameters": size, "num_bytes": 4 * size, "seconds": seconds}
        means = {key: SweepEstimate(value) for key, value in costs.items()} | {"tokens_per_s": None}
        rows.append(SweepRow(name.format(number, number), {}, 1, 1, means, {"loss": loss}, {}))
    return sorted(rows, key=lambda row: row.rank)


def label_boxes(figure: Any) -> list[tuple[str, Any]]:
    """Return the text and the box of everything that is written into a figure."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text()]
    ticks = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        for label in (tick.label1, tick.label2)
    }
    shown = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
        if _in_view(axes, axis, label)
    }
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if id(text) not in ticks or id(text) in shown
    ]


def _in_view(axes: Any, axis: Any, label: Any) -> bool:
    value = label.get_position()[0 if axis is axes.xaxis else 1]
    low, high = sorted(axis.get_view_interval())
    return bool(low <= value <= high)


def test_no_label_touches_another_and_none_is_lost(subtests):
    for title, given in PICTURES.items():
        with subtests.test(title):
            rows = rows_of(*given)
            figure = draw(rows, "held-out loss")
            boxes = label_boxes(figure)
            touching = [
                (one, other) for (one, box), (other, more) in combinations(boxes, 2) if box.padded(-0.5).overlaps(more)
            ]
            assert not touching
            width, height = figure.bbox.size
            outside = [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
            assert not outside
            names = [text for text, _ in boxes if text.rsplit(" ", 1)[-1] in map(str, range(1, 51)) and "=" in text]
            assert len(names) == len(rows), "every member has its line"
            for axes in figure.axes[1:]:
                numbers = [text.get_text() for text in axes.texts]
                assert len(set(numbers)) == len(numbers) > 0.7 * len(rows), "most points have their number"


def test_costs_that_do_not_differ_have_no_panel():
    def panels(rows: list[SweepRow]) -> list[str]:
        return [axes.get_xlabel() for axes in draw(rows, "held-out loss").axes[1:]]

    assert panels(rows_of(4, [2e6], "seed={}")) in ([], ["time of training"])
    assert panels(rows_of(4, [1e6, 3e6], "seed={}")) == ["parameters", "size of the weights", "time of training"]
    one = rows_of(1, [2e6], "seed={}")
    assert panels(one) == []


def test_unknown_costs_and_qualities_without_an_interval(tmp_path):
    rows = rows_of(5, [1e6, 2e6], "seed={}")
    rows[2].costs["num_bytes"] = None
    assert write_plot(tmp_path / "quality.png", rows, "held-out ndcg_at_10")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
