"""``kdcache estimate``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import click

from kdcache import terminal
from kdcache.cli import dump_teacher, options, settings
from kdcache.presets import PRESETS
from kdcache.words import count

_EPILOG = """\b
Examples:
  kdcache estimate --teacher HuggingFaceTB/SmolLM2-135M --corpus texts/
  kdcache estimate --config dump.yaml --preset compact --preset hybrid --positions 16384
  kdcache dump-teacher --preset hybrid --teacher HuggingFaceTB/SmolLM2-135M --corpus texts/ --output cache

How to read the table: "KL lost" is the KL, in nats, from the kept ids and their tail to what the codec stores. "full
KL" is the KL from the teacher's full distribution, with the best tail handling that the preset allows. "batch error"
is the error of the mean target of a batch of 4,096 positions: noise for samples, which are unbiased, and bias for kept
ids.
"""

#: Options of ``dump-teacher`` for teacher, corpus and sequences; a preset sets the others.
_SHARED = (
    "teacher",
    "corpus",
    "task",
    "max_length",
    "pack",
    "text_field",
    "column",
    "split_text",
    "leave_out",
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
@click.option(
    "--preset",
    multiple=True,
    metavar="NAME",
    help=f"Preset to measure: {', '.join(PRESETS)}. Repeatable.  [default: all]",
)
@click.option(
    "--positions",
    type=int,
    default=4096,
    show_default=True,
    help="Size of the pilot: whole sequences with at least this many positions.",
)
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
    """Compare the presets of a dump on a pilot: size, time and information lost; write nothing.

    Runs the teacher over sequences from all of the corpus, encodes the targets with every preset in memory, and
    compares what is decoded with the teacher's full distribution. Prints bytes per token, the size and duration of the
    whole dump, the KL that is lost, and the losses, tail handling and temperatures that a student may use.

    A configuration file for dump-teacher may be given; its output, targets and hidden states are ignored.
    """
    from kdcache.config import load
    from kdcache.dump import DumpConfig
    from kdcache.estimate import estimate_presets

    nested = options.settings_tree({**settings.of_sources(given), "output": "none"})
    config = load(DumpConfig, file=config_file, assignments=assignments, options=nested)
    result = estimate_presets(config, num_positions=positions, presets=preset, progress=not quiet)
    if as_json:
        terminal.echo_json(result.to_dict())
        return
    pilot = "all of them measured"
    if result.pilot_positions < result.num_positions:
        pilot = f"{result.pilot_positions:,} of them measured, in {count(result.pilot_sequences, 'sequence')}"
    terminal.echo(
        f"{result.teacher}: loss {result.teacher_loss:.3f} nats, {result.teacher_tokens_per_s:,.0f} positions/s; "
        f"{count(result.num_documents, 'document')}, {count(result.num_positions, 'position')}, {pilot}\n"
    )
    _echo_table([_row(item) for item in result.presets if item.measurement is not None])
    if result.pilot_positions < result.num_positions:
        terminal.echo(
            f"\nbytes/token are those of {count(result.pilot_sequences, 'sequence')}; the range is a 90 % interval for "
            "the whole corpus, too narrow where sequences are few. More --positions make it narrower and surer."
        )
    _echo_notes(result.presets)
    terminal.echo("\nWhat a student may use (train-student --set objective...):\n")
    _echo_choices(result.presets)
    terminal.echo("\nNothing was written; to make a cache, run kdcache dump-teacher --preset NAME.")


def _row(item: Any) -> dict[str, str]:
    found = item.measurement
    errors = found.batch_mean_error
    return {
        "preset": item.name,
        "bytes/token": f"{found.bytes_per_token:.1f}",
        "range": _range(found.bytes_interval),
        "size": options.human_bytes(item.total_bytes),
        "KL lost": _nats(found.codec_kl),
        "kept mass": "-" if found.kept_mass is None else f"{found.kept_mass:.3f}",
        "full KL": "-" if item.best_tail is None else f"{_nats(found.full_kl[item.best_tail])} {item.best_tail}",
        "batch error": f"{min(errors.values()):.1e}",
        "dump time": options.human_seconds(item.dump_s),
    }


def _range(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "-"
    low, high = (f"{max(value, 0):.1f}" for value in interval)
    return "-" if low == high else f"{low} to {high}"


def _nats(value: float | None) -> str:
    if not value:
        return "-" if value is None else "0"
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3f}"


def _echo_table(rows: list[dict[str, str]]) -> None:
    from kdcache.table import render_table

    if rows:
        columns = {name: (name, "s" if name == "preset" else ">s") for name in rows[0]}
        terminal.echo(render_table(columns, [SimpleNamespace(**row) for row in rows]))


def _echo_notes(presets: list[Any]) -> None:
    files = {name: size for item in presets for name, size in item.cache_files.items()}
    if files:
        listed = ", ".join(f"{name} {options.human_bytes(size)}" for name, size in files.items())
        terminal.echo(f"\nOnce per cache that has it, not in the sizes above: {listed}.")
    for item in presets:
        if item.unavailable is not None:
            terminal.echo(f"\n{item.name} is not available: {item.unavailable}")


def _echo_choices(presets: list[Any]) -> None:
    # Presets that allow the same choices share an entry.
    groups: dict[str, list[str]] = {}
    for item in presets:
        if item.measurement is not None:
            groups.setdefault("\n".join(_choice_lines(item.choices)), []).append(item.name)
    for text, names in groups.items():
        terminal.echo(f"{', '.join(names)}\n{text}")


def _choice_lines(choices: list[Any]) -> list[str]:
    # Losses with the same choices, or unsupported for the same reason, share a line.
    groups: dict[str, list[str]] = {}
    for choice in choices:
        parts = []
        if choice.tails:
            parts.append(f"tail {', '.join(choice.tails)}")
        if choice.modes is not None:
            modes = [f"{temperatures} ({mode})" for mode, temperatures in choice.modes.items()]
            parts.append(f"temperature {', '.join(['1', *modes])}")
        words = f"no: {choice.incompatibility}" if choice.incompatibility is not None else "; ".join(parts) or "yes"
        groups.setdefault(words, []).append(choice.loss)
    return [f"  {', '.join(losses)}: {words}" for words, losses in groups.items()]
