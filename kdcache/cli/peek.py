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
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="How many choices to show at each.")
@options.json_option
def command(cache: str, sequence: int, positions: str | None, select: str, count: int, top: int, as_json: bool) -> None:
    """Show one text of CACHE and what the teacher expected at some of its positions.

    For each position: the text before it, the token that really follows (marked *), the teacher's top choices with
    their probabilities, the tail (probability of all ids that were not kept) and the entropy in nats. Where CACHE holds
    draws, they come after the kept ids, each with its share of the tail.
    """
    from kdcache.cache import open_cache
    from kdcache.viewer import peek

    chosen = _parse_positions(positions)
    result = peek(open_cache(cache), sequence, positions=chosen, select=select, count=count, top=top)
    if as_json:
        options.echo_json(result.to_dict())
        return
    metadata = {key: value for key, value in result.metadata.items() if key not in ("token_hash", "sequence")}
    click.echo(f"sequence {sequence}: " + ", ".join(f"{key} {_short(value)}" for key, value in metadata.items()))
    click.echo(f"\n{result.text}\n")
    for position in result.positions:
        _echo_position(position)


def _parse_positions(text: str | None) -> list[int]:
    if not text:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers separated by commas, found {text!r}", param_hint="--at") from None


def _short(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _drawn(choice: Any, gold: Any) -> str:
    if not choice.num_draws:
        return ""
    own = f"; its own probability {gold.probability:.4f}" if choice.id == gold.id else ""
    return f"  (share of {choice.num_draws} {'draw' if choice.num_draws == 1 else 'draws'}{own})"


def _echo_position(position: Any) -> None:
    context = position.before[-60:].replace("\n", "\u23ce")
    note = "" if position.counts else "  (does not count in the loss)"
    click.echo(f"position {position.position}: ...{context}|{note}")
    known = {choice.id for choice in position.top}
    for choice in position.top:
        mark = "*" if choice.id == position.gold.id else " "
        click.echo(f"  {mark} {choice.probability:7.4f}  {choice.token!r}{_drawn(choice, position.gold)}")
    if position.gold.id not in known:
        click.echo(f"  * {position.gold.probability:7.4f}  {position.gold.token!r}  (what really follows)")
    click.echo(f"    tail {position.tail:.4f}, entropy {position.entropy:.3f} nats")
