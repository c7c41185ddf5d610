"""``kdcache peek``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cli import options

_EPILOG = """\b
Examples:
  kdcache peek cache
  kdcache peek cache --sequence 12 --select loss --count 5
  kdcache peek cache --sequence 12 --at 0,1,2,3 --top 10 --json
"""


@click.command("peek", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.argument("cache")
@click.option("--sequence", default=0, show_default=True, help="Number of the sequence.")
@click.option("--at", "positions", metavar="P,P,...", help="Positions to show, instead of selecting some.")
@click.option("--select", default="spread", show_default=True, help="Choose positions by: spread, entropy, loss.")
@click.option("--count", default=8, show_default=True, type=click.IntRange(1), help="How many positions to choose.")
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(1), help="How many choices (classes, ...) to show."
)
@options.json_option
def command(cache: str, sequence: int, positions: str | None, select: str, count: int, top: int, as_json: bool) -> None:
    """Show one text of CACHE and what the teacher thought of it.

    Where the teacher answers with tokens, for some positions: the text before it, the token that really follows (marked
    *), the teacher's top choices with their probabilities, the tail (probability of all ids that were not kept) and the
    entropy in nats. Where CACHE holds samples, they come after the kept ids, each with its share of the tail. Positions
    of masked-lm are the places of hidden tokens in the text, those of seq2seq-lm are in the target.

    Otherwise the text, or texts, with the teacher's answer and the corpus's own: classes with their probabilities and
    raw logits (the corpus's marked *), a score, the first numbers of an embedding, or the documents of a query by
    falling score (relevant ones marked *).
    """
    from kdcache.cache import open_cache
    from kdcache.peek import peek_cache

    chosen = _parse_positions(positions)
    result = peek_cache(open_cache(cache), sequence, positions=chosen, select=select, count=count, top=top)
    if as_json:
        options.echo_json(result.to_dict())
        return
    metadata = {key: value for key, value in result.metadata.items() if key not in ("token_hash", "sequence")}
    click.echo(f"sequence {sequence}: " + ", ".join(f"{key} {_short(value)}" for key, value in metadata.items()))
    click.echo()
    click.echo(result.render())


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
