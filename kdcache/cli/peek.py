"""``kdcache peek``."""

from __future__ import annotations

from typing import Any

import click

from kdcache import terminal
from kdcache.cli import options

_EPILOG = """\b
Examples:
  kdcache peek cache
  kdcache peek cache --sequence 12 --select loss --count 5
  kdcache peek cache --sequence 12 --at 0,1,2,3 --top 10 --json
"""


@click.command("peek", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.argument("cache")
@click.option("--sequence", default=0, show_default=True, help="Show the sequence with this number, counted from 0.")
@click.option("--at", "positions", metavar="P,P,...", help="Show these positions, instead of --select.")
@click.option(
    "--select",
    default="spread",
    show_default=True,
    help="Select positions: spread evenly, or those of highest entropy or loss.",
)
@click.option("--count", default=8, show_default=True, type=click.IntRange(1), help="Select this many positions.")
@click.option(
    "--top",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Show this many ids, classes, numbers or documents.",
)
@options.json_option
def command(cache: str, sequence: int, positions: str | None, select: str, count: int, top: int, as_json: bool) -> None:
    """Show one sequence of CACHE with the teacher's predictions.

    For language models, some positions of the sequence: the text before the position, the top ids with their
    probabilities, the gold token (marked *), the tail mass and the entropy in nats. Samples follow the kept ids, each
    with its share of the tail. In masked-lm a position is the token index of a masked token; in seq2seq-lm it is in the
    target.

    For other tasks, the texts with the teacher's output and the label: classes with probabilities and logits (the label
    marked *), a score, the first numbers of an embedding, or the documents of a query in the order of their scores
    (relevant documents marked *).
    """
    from kdcache.peek import peek_cache

    chosen = _parse_positions(positions)
    result = peek_cache(cache, sequence, positions=chosen, select=select, count=count, top=top)
    if as_json:
        terminal.echo_json(result.to_dict())
        return
    metadata = {key: value for key, value in result.metadata.items() if key not in ("token_hash", "sequence")}
    shown = ", ".join(f"{key} {_short(value)}" for key, value in metadata.items())
    terminal.echo(terminal.one_line(f"sequence {sequence}: {shown}"))
    terminal.echo()
    terminal.echo(result.render())


def _parse_positions(text: str | None) -> list[int]:
    if not text:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers separated by commas, found {text!r}", param_hint="--at") from None


def _short(value: Any, length: int = 60) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if len(text) <= length else text[: length - 3] + "..."
