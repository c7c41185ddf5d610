"""The table of a sweep: one row per variation, with its settings, costs and quality.

With several seeds, a number is a mean with the half width of its 95 % interval (Student's t). With three seeds, two
students may differ considerably by chance; means alone would hide that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import yaml

from kdcache.sweep.plan import SweepPlan
from kdcache.sweep.results import HeldOut, Outcome, StudentResult, SweepFailure
from kdcache.sweep.variations import Variation, flatten
from kdcache.table import render_table

#: 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.96

#: Column -> (heading, number format): costs of a student, and its metrics on the held-out cache.
_COSTS = {
    "num_parameters": ("parameters", ",.0f"),
    "num_bytes": ("bytes", ",.0f"),
    "seconds": ("seconds", ",.1f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
}
_QUALITIES = {
    "loss": ("held-out loss", ".4f"),
    "kl": ("KL", ".4f"),
    "agreement": ("agreement", ".4f"),
    "ece": ("ECE", ".4f"),
}


@dataclass(frozen=True)
class SweepEstimate:
    """A mean, and the half width of its 95 % interval if there are several different values."""

    mean: float
    half_width: float | None = None

    def __format__(self, form: str) -> str:
        width = "" if self.half_width is None else f" ± {self.half_width:{form}}"
        return f"{self.mean:{form}}{width}"


def estimate(values: Sequence[float]) -> SweepEstimate:
    """Return the mean of ``values`` with the half width of its 95 % interval (Student's t)."""
    mean = statistics.mean(values)
    if len(set(values)) < 2:
        return SweepEstimate(mean)
    return SweepEstimate(mean, _t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def _t(freedom: int) -> float:
    # Beyond the table the expansion around the normal distribution is good to three digits.
    return _T[freedom - 1] if freedom <= len(_T) else _NORMAL + 2.37 / freedom + 2.82 / freedom**2


@dataclass(frozen=True)
class SweepRow:
    """A variation: the settings that vary, and means over its finished students.

    ``costs`` and ``held_out`` by the names of `StudentResult` and `HeldOut`, ``losses`` those of training.
    """

    name: str
    settings: dict[str, str | None]
    num_finished: int
    num_students: int
    costs: dict[str, SweepEstimate | None]
    held_out: dict[str, SweepEstimate | None]
    losses: dict[str, SweepEstimate | None]

    @property
    def ranked_by(self) -> str:
        """The heading of what students are ordered by: held-out loss or KL, the task's first metric, or training loss.

        A task without distributions has no loss on a held-out cache; without such a cache there is that of training.
        """
        known = [key for key, value in self.held_out.items() if value is not None]
        first = next((key for key in known if key in ("loss", "kl") or key not in _QUALITIES), None)
        return "training loss" if first is None else f"held-out {first}"

    @property
    def quality(self) -> SweepEstimate | None:
        """The number that students are ordered by."""
        kind, _, key = self.ranked_by.partition(" ")
        return self.losses.get(key) if kind == "training" else self.held_out[key]

    @property
    def rank(self) -> float:
        """Lower is better; infinite where nothing is known."""
        if self.quality is None:
            return math.inf
        is_cost = self.ranked_by.endswith(("loss", "kl", "mse"))
        return self.quality.mean if is_cost else -self.quality.mean

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return asdict(self)


def make_rows(plan: SweepPlan, outcomes: Mapping[str, Outcome]) -> list[SweepRow]:
    """Return one row per variation that is known, best first; those without a finished student come last."""
    groups: dict[str, list[Variation]] = {}
    for run in plan.runs:
        groups.setdefault(run.variation.group, []).append(run.variation)
    settings = _varying(groups)
    rows = [_row(name, settings[name], group, outcomes) for name, group in groups.items()]
    return sorted(rows, key=lambda row: row.rank)


def _row(
    name: str, settings: dict[str, str | None], group: Sequence[Variation], outcomes: Mapping[str, Outcome]
) -> SweepRow:
    found = [outcomes.get(variation.name) for variation in group]
    finished = [outcome for outcome in found if isinstance(outcome, StudentResult)]
    terms = dict.fromkeys(name for result in finished for name in result.losses)
    costs = {key: _over([getattr(result, key) for result in finished]) for key in _COSTS}
    return SweepRow(
        name,
        settings,
        len(finished),
        len(group),
        # Intervals of times would show how busy the machine was.
        {key: value and SweepEstimate(value.mean) for key, value in costs.items()},
        _held_out([result.held_out for result in finished]),
        {term: _over([result.losses.get(term) for result in finished]) for term in terms},
    )


def _held_out(results: Sequence[HeldOut | None]) -> dict[str, SweepEstimate | None]:
    """Return the means of all held-out metrics, under the names of `HeldOut` and of the task's metrics."""
    names = dict.fromkeys(name for one in results if one is not None for name in one.metrics)
    metrics = {name: _over([None if one is None else one.metrics.get(name) for one in results]) for name in names}
    return {key: _over([getattr(one, key, None) for one in results]) for key in _QUALITIES} | metrics


def _over(values: Sequence[float | None]) -> SweepEstimate | None:
    known = [value for value in values if value is not None]
    # A student whose loss is not finite makes the mean of its variation unknown, not better.
    return estimate(known) if known and len(known) == len(values) else None


def _varying(groups: Mapping[str, Sequence[Variation]]) -> dict[str, dict[str, str | None]]:
    """Return the settings in which variations differ, as text, for every variation."""
    configs = {name: flatten(group[0].config.model_dump(mode="json")) for name, group in groups.items()}
    keys = dict.fromkeys(key for group in groups.values() for key in group[0].changes)
    shown = {name: {key: _text(flat.get(key)) for key in keys} for name, flat in configs.items()}
    differ = [key for key in keys if len({values[key] for values in shown.values()}) > 1]
    return {name: {key: values[key] for key in differ} for name, values in shown.items()}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def render(
    plan: SweepPlan, rows: Sequence[SweepRow], outcomes: Mapping[str, Outcome], *, markdown: bool = False
) -> str:
    """Return the table of a sweep, with notes below it."""
    columns = {"name": ("student", "s"), **{key: (key.removeprefix("objective."), "s") for key in rows[0].settings}}
    if any(row.num_students > 1 for row in rows):
        columns["seeds"] = ("seeds", "s")
    metrics = dict.fromkeys(key for row in rows for key in row.held_out if key not in _QUALITIES)
    qualities = _QUALITIES | {key: (key.replace("_", " "), ".4f") for key in metrics}
    columns |= _COSTS | {f"held-out {key}": column for key, column in qualities.items()}
    columns |= {f"training {term}": (f"training {term}", ".4f") for row in rows for term in row.losses}
    table = render_table(columns, [SimpleNamespace(**_cells(row, columns)) for row in rows], markdown=markdown)
    notes = [f"- {note}" if markdown else note for note in _notes(plan, outcomes)]
    return "\n".join([table, *([""] if markdown else []), *notes])


def _cells(row: SweepRow, columns: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {"name": row.name, "seeds": f"{row.num_finished}/{row.num_students}", **row.settings}
    cells |= row.costs | {f"held-out {key}": value for key, value in row.held_out.items()}
    cells |= {f"training {term}": value for term, value in row.losses.items()}
    return {key: cells.get(key) for key in columns}


def _notes(plan: SweepPlan, outcomes: Mapping[str, Outcome]) -> list[str]:
    results = [outcome for outcome in outcomes.values() if isinstance(outcome, StudentResult)]
    evaluated = [result.held_out for result in results if result.held_out is not None]
    notes = []
    if plan.held_out is None:
        notes.append(
            "no held_out cache was given: the losses are those of training, which do not tell about other texts and "
            "cannot be compared between objectives"
        )
    elif evaluated and evaluated[0].teacher_loss is not None:
        notes.append(f"held-out loss of the teacher: {evaluated[0].teacher_loss:.4f}")
    if any(run.variation.seed is not None for run in plan.runs):
        notes.append("several seeds: mean ± half width of its 95 % interval (Student's t)")
    notes += [f"warning: {warning}" for result in evaluated for warning in result.warnings]
    notes += [
        f"failed: {outcome.name}: {outcome.error}" for outcome in outcomes.values() if isinstance(outcome, SweepFailure)
    ]
    return notes
