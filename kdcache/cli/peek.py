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
    _ECHO.get(type(result).__name__, _echo_text)(result)


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


# ------------------------------------------------------------------------------------------------------------- tokens


def _echo_text(result: Any) -> None:
    click.echo(f"{result.text}\n")
    for position in result.positions:
        _echo_position(position)


def _echo_target(result: Any) -> None:
    click.echo(f"input: {result.text}\ntarget: {result.target}\n")
    for position in result.positions:
        _echo_position(position)


def _drawn(choice: Any, gold: Any) -> str:
    if not choice.num_samples:
        return ""
    own = f"; its own probability {gold.probability:.4f}" if gold is not None and choice.id == gold.id else ""
    return f"  (share of {choice.num_samples} {'draw' if choice.num_samples == 1 else 'samples'}{own})"


def _echo_position(position: Any) -> None:
    gold, is_hidden = position.gold, hasattr(position, "fed")
    note = "" if position.counts else "  (does not count in the loss)"
    around = f"{_one_line(position.before)[-60:]}|"
    if is_hidden:
        around += f"{_one_line(position.fed)}|{_one_line(position.after)[:60]}..."
    click.echo(f"position {position.position}: ...{around}{note}")
    for choice in position.top:
        mark = "*" if gold is not None and choice.id == gold.id else " "
        click.echo(f"  {mark} {choice.probability:7.4f}  {choice.token!r}{_drawn(choice, gold)}")
    if gold is not None and gold.id not in {choice.id for choice in position.top}:
        words = "what was hidden" if is_hidden else "what really follows"
        click.echo(f"  * {gold.probability:7.4f}  {gold.token!r}  ({words})")
    click.echo(f"    tail {position.tail:.4f}, entropy {position.entropy:.3f} nats")


def _one_line(text: str) -> str:
    return text.replace("\n", "\u23ce")


# ------------------------------------------------------------------------------------------------------- whole texts


def _echo_pair(result: Any) -> None:
    click.echo(result.text if result.text_pair is None else f"{result.text}\n{result.text_pair}")
    click.echo()


def _echo_classes(result: Any) -> None:
    _echo_pair(result)
    label = result.label
    is_shown = label is None or label.id in {choice.id for choice in result.top}
    choices = [*result.top, *([] if is_shown else [label])]
    width = max(len(choice.name) for choice in choices)
    for choice in choices:
        mark = "*" if label is not None and choice.id == label.id else " "
        click.echo(f"  {mark} {choice.probability:7.4f}  {choice.name:{width}}  logit {choice.logit:8.4f}")
    click.echo(f"    entropy {result.entropy:.3f} nats, {'no label' if label is None else f'label {label.name}'}")


def _echo_score(result: Any) -> None:
    _echo_pair(result)
    click.echo(f"  score {', '.join(f'{score:.4f}' for score in result.scores)}, label {_known(result.label)}")


def _echo_embedding(result: Any) -> None:
    for text in result.texts:
        more = ", ..." if len(text.numbers) < result.width else ""
        click.echo(f"{text.text}\n  [{', '.join(f'{n:.4f}' for n in text.numbers)}{more}], norm {text.norm:.4f}")
    form = "" if result.normalised is None else f", {'normalised' if result.normalised else 'not normalised'}"
    click.echo(f"\n  {result.width} numbers, {result.pooling or 'no'} pooling{form}")
    if len(result.texts) > 1:
        click.echo(f"  cosine {_known(result.cosine)}, label {_known(result.label)}")


def _echo_ranking(result: Any) -> None:
    click.echo(f"{result.query}\n")
    for item in result.documents:
        mark = "*" if (item.relevance or 0) > 0 else " "
        judged = "not judged" if item.relevance is None else f"relevance {item.relevance:g}"
        text = _short(_one_line(item.text), 80)
        click.echo(f"  {mark} {item.rank:3d}. {item.score:8.4f}  {text}  (document {item.document}, {judged})")
    click.echo(f"    {len(result.documents)} of {result.num_documents} documents shown")


def _known(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


#: How each kind of view is printed, by the name of its class, which is not imported before it is needed.
_ECHO = {
    "PeekResult": _echo_text,
    "TargetResult": _echo_target,
    "ClassesView": _echo_classes,
    "ScoreView": _echo_score,
    "EmbeddingView": _echo_embedding,
    "RankingView": _echo_ranking,
}
