"""``kdcache sweep``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kdcache import terminal
from kdcache.cli import options
from kdcache.words import count

if TYPE_CHECKING:
    from kdcache.sweep import SweepPlan, SweepResult

_EPILOG = """\b
The file:
  output: runs                       # one directory per student, sweep.json, table.md, quality.png
  held_out: held-out-cache           # for evaluation
  jobs: 2                            # students trained in parallel
  base: {cache: cache, student: {size: tiny}, epochs: 2}         # or base_file: train.yaml
  grid: {objective.forward_kl.temperature: [1, 2], student.size: [nano, tiny]}
  runs: [{name: ce, set: {objective.cross_entropy.weight: 1}}]
  seeds: [0, 1]

\b
grid and runs change base as --set changes --config in train-student.
"""


@click.command("sweep", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@click.option("--jobs", type=click.IntRange(min=1), help="Train this many students in parallel.  [default: as in FILE]")
@click.option("--dry-run", is_flag=True, help="Check all settings and list the students; train nothing.")
@options.json_option
@options.quiet_option
def command(file: str, jobs: int | None, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Train many students from one cache, several in parallel, and compare them in a table and a plot.

    FILE is checked completely before the first student trains. To resume an interrupted sweep, run the same command
    again: finished students are kept, the others resume from their last checkpoints. Exits with 1 if a student failed.
    """
    from kdcache.sweep import preview_sweep, read_sweep, sweep_students

    config = read_sweep(file)
    if jobs is not None:
        config = config.model_copy(update={"jobs": jobs})
    if dry_run:
        plan = preview_sweep(config, progress=not quiet)
        if as_json:
            terminal.echo_json(plan.to_dict())
        else:
            _echo_plan(plan)
        return
    result = sweep_students(config, progress=not quiet)
    if as_json:
        terminal.echo_json(result.to_dict())
    else:
        terminal.echo(result.table())
        terminal.echo(f"\nThe students are in {config.output}.{_about_plot(result)}")
    if result.failures:
        sys.exit(1)


def _about_plot(result: SweepResult) -> str:
    if result.plot is not None:
        return f" The plot is {result.plot}."
    # Without any quality there is nothing to plot.
    return "" if all(row.quality is None for row in result.rows) else " For a plot: pip install 'kdcache[report]'."


def _echo_plan(plan: SweepPlan) -> None:
    """Print the students of a sweep with their changes to base, and the totals."""
    for run in plan.runs:
        changes = ", ".join(f"{key}={value}" for key, value in run.variation.changes.items())
        objective = " + ".join(f"{_weight(part.weight)} {name}" for name, part in run.objective.parts.items())
        terminal.echo(f"{run.name} ({run.state})")
        terminal.echo(f"  {changes or 'as base'}; objective {objective}")
        terminal.echo(
            f"  {count(run.num_parameters, 'parameter')}, {count(run.steps, 'step')}, "
            f"{count(run.num_positions, 'position')}"
        )
    steps, positions = (sum(getattr(run, name) for run in plan.runs) for name in ("steps", "num_positions"))
    held_out = "no held-out cache" if plan.held_out is None else f"evaluated on {plan.held_out[0]}"
    terminal.echo(
        f"\n{count(len(plan.runs), 'student')}, {count(steps, 'step')}, {count(positions, 'position')}; {held_out}. "
        "Nothing was trained."
    )


def _weight(weight: object) -> str:
    return f"{weight:g}" if isinstance(weight, int | float) else "scheduled"
