"""``kdcache estimate``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import click

from kdcache.cli import dump_teacher, options, settings
from kdcache.presets import PRESETS

_EPILOG = """\b
Examples:
  kdcache estimate --teacher HuggingFaceTB/SmolLM2-135M --corpus texts/
  kdcache estimate --config dump.yaml --preset compact --preset hybrid --positions 16384
  kdcache dump-teacher --preset hybrid --teacher HuggingFaceTB/SmolLM2-135M --corpus texts/ --output cache

How to read the table: KL lost is what storing the kept ids and their tail costs in nats; full KL is what is
missing of the whole distribution when the tail is completed in the best way that the preset allows. Samples lose
nothing on average, but are noisy: the batch error is the noise (or, for kept ids, the bias) of the mean target
of a batch of 4,096 positions.
"""

#: Options of ``dump-teacher`` that say which teacher runs on what and how; presets decide the others.
_SHARED = (
    "teacher",
    "corpus",
    "task",
    "max_length",
    "pack",
    "text_field",
    "column",
    "split_text",
    "limit_documents",
    "batch_tokens",
    "dtype",
    "device",
    "revision",
    "config_file",
    "assignments",
)
_OPTIONS: list[click.Parameter] = [p for p in dump_teacher.command.params if p.name in _SHARED]


@click.command("estimate", context_settings=options.CONTEXT, epilog=_EPILOG, params=_OPTIONS)
@click.option("--preset", multiple=True, metavar="NAME", help=f"{', '.join(PRESETS)}. Repeatable.  [default: all]")
@click.option("--positions", type=int, default=4096, show_default=True, help="Positions of the pilot, about.")
@options.json_option
@options.quiet_option
def command(
    config_file: str | None,
    assignments: tuple[str, ...],
    preset: tuple[str, ...],
    positions: int,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Show what every preset of a dump would cost and keep, before a teacher runs for days; write nothing.

    Runs the teacher once over a pilot of sequences from all of the corpus, stores their targets in memory by every
    preset, reads them back, and compares them with the teacher's full distribution. Prints bytes per token, size and
    time for the whole corpus, what is lost, and which losses, tails and temperatures a student may then choose.

    Of a configuration file for dump-teacher, the output and the settings of targets and hidden states play no part.
    """
    from kdcache.config import load
    from kdcache.dump import DumpConfig
    from kdcache.estimate import estimate_presets

    nested = options.nest({**settings.of_sources(given), "output": "none"})
    config = load(DumpConfig, file=config_file, assignments=assignments, options=nested)
    result = estimate_presets(config, num_positions=positions, presets=preset, progress=not quiet)
    if as_json:
        options.echo_json(result.to_dict())
        return
    click.echo(
        f"{result.teacher}: loss {result.teacher_loss:.3f} nats, {result.teacher_tokens_per_s:,.0f} tokens/s; "
        f"{result.num_documents:,} documents, {result.num_positions:,} positions; pilot of {result.pilot_positions:,}\n"
    )
    _echo_table([_row(item) for item in result.presets if item.measurement is not None])
    _echo_notes(result.presets)
    click.echo("\nWhat a student may choose (train-student --set objective...):\n")
    _echo_choices(result.presets)
    click.echo("\nNothing was written; kdcache dump-teacher --preset NAME makes the cache.")


def _row(item: Any) -> dict[str, str]:
    found = item.measurement
    errors = found.batch_mean_error
    return {
        "preset": item.name,
        "bytes/token": f"{found.bytes_per_token:.1f}",
        "size": options.human_bytes(item.total_bytes),
        "KL lost": _nats(found.codec_kl),
        "kept mass": "-" if found.kept_mass is None else f"{found.kept_mass:.3f}",
        "full KL": "-" if item.best_tail is None else f"{_nats(found.full_kl[item.best_tail])} {item.best_tail}",
        "batch error": f"{min(errors.values()):.1e}",
        "dump time": options.human_seconds(item.dump_s),
    }


def _nats(value: float | None) -> str:
    if not value:
        return "-" if value is None else "0"
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3f}"


def _echo_table(rows: list[dict[str, str]]) -> None:
    from kdcache.table import render_table

    if rows:
        columns = {name: (name, "s" if name == "preset" else ">s") for name in rows[0]}
        click.echo(render_table(columns, [SimpleNamespace(**row) for row in rows]))


def _echo_notes(presets: list[Any]) -> None:
    files = {name: size for item in presets for name, size in item.cache_files.items()}
    if files:
        listed = ", ".join(f"{name} {options.human_bytes(size)}" for name, size in files.items())
        click.echo(f"\nOnce per cache that has it, not in the sizes above: {listed}.")
    for item in presets:
        if item.unavailable is not None:
            click.echo(f"\n{item.name} is not available: {item.unavailable}")


def _echo_choices(presets: list[Any]) -> None:
    # Presets that allow the same are one entry.
    groups: dict[str, list[str]] = {}
    for item in presets:
        if item.measurement is not None:
            groups.setdefault("\n".join(_choice_lines(item.choices)), []).append(item.name)
    for text, names in groups.items():
        click.echo(f"{', '.join(names)}\n{text}")


def _choice_lines(choices: list[Any]) -> list[str]:
    # Losses that allow the same, or are refused for the same reason, share a line.
    groups: dict[str, list[str]] = {}
    for choice in choices:
        parts = []
        if choice.tails:
            parts.append(f"tail {', '.join(choice.tails)}")
        if choice.modes is not None:
            modes = [f"{temperatures} ({mode})" for mode, temperatures in choice.modes.items()]
            parts.append(f"temperature {', '.join(['1', *modes])}")
        said = f"no: {choice.refusal}" if choice.refusal is not None else "; ".join(parts) or "yes"
        groups.setdefault(said, []).append(choice.loss)
    return [f"  {', '.join(losses)}: {said}" for said, losses in groups.items()]
