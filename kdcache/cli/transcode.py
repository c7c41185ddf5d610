"""``kdcache transcode``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cli import options, settings
from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS
from kdcache.schema import KINDS

_EPILOG = """\b
Examples:
  kdcache transcode cache small --top-k 32
  kdcache transcode cache smaller --min-prob 0.001 --codec compact --drop-hidden
  kdcache transcode cache coarse --set targets.codec.grid=8
  kdcache transcode cache easy --where "teacher_loss < 5 and num_positions >= 64"
  kdcache transcode cache tenth --where "sequence % 10 == 0 and source in ['wiki', 'books']"
  kdcache transcode hidden-cache top-64 --targets top-k --temperatures 0.5,2
  kdcache transcode hidden-cache drawn --targets sampled --samples 50

What is not given stays as in SRC (after --targets with another kind, numbers are those of a dump of that kind). From
kept ids fewer can be made, from samples nothing else; a cache of the kind hidden holds everything the teacher knew and
becomes any kind, and then keeps its last state only if --layers names it. kdcache inspect shows what SRC holds. Tails,
entropy and the gold token stay exact; the tail prior does unless --where or --limit-sequences chooses some sequences,
for which that of all of them stands. A column whose name is no word stands in `backquotes` in --where.

A transcoding that was interrupted goes on where it stopped when the same command runs again.
"""


@click.command("transcode", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.argument("source", metavar="SRC")
@click.argument("output", metavar="DST")
@click.option("--targets", type=click.Choice(KINDS), help="Another kind; SRC has to be of the kind hidden.")
@click.option("--top-k", type=int, help="Most token ids kept at a position; what is dropped goes to the tail.")
@click.option("--min-prob", type=float, help="Keep only ids of at least this probability (and the first).")
@click.option("--min-mass", type=float, help="Keep the fewest ids that together have this probability.")
@click.option("--samples", type=int, help="Samples at every position (with --targets sampled or hybrid).")
@click.option("--temperatures", metavar="T,T,...", help="Other temperatures at which the tail is kept; '' for none.")
@click.option("--tail-prior/--no-tail-prior", default=None, help="Whether the mean tail is kept.")
@click.option("--codec", type=click.Choice(list(TOPK_CODECS)), help="How kept values are stored.")
@click.option("--layers", metavar="LAYERS", help="Keep only these of the stored hidden states, such as last,12.")
@click.option("--drop-hidden", is_flag=True, help="Keep no hidden states (the kind hidden keeps its last one).")
@click.option("--hidden-codec", type=click.Choice(list(VECTOR_CODECS)), help="How hidden states are stored.")
@click.option("--where", metavar="FILTER", help="Keep only sequences of which this is true, such as teacher_loss < 5.")
@click.option("--limit-sequences", type=int, help="Keep only the first ones (that --where chooses).")
@click.option("--device", help="Of the LM head of a SRC of the kind hidden.  [default: the best there is]")
@options.config_options
@click.option("--dry-run", is_flag=True, help="Print what would be made, with its size; write nothing.")
@click.option("--no-verify", is_flag=True, help="Do not read the finished cache again to check its hashes.")
@options.json_option
@options.quiet_option
def command(
    source: str,
    output: str,
    config_file: str | None,
    assignments: tuple[str, ...],
    dry_run: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Make the cache DST from the finished cache SRC, without the teacher.

    Fewer kept ids, rows of as many ids as count, another codec, fewer hidden states, some of the sequences; and any
    kind of targets from a cache of the kind hidden. SRC is only read. Needs torch only for targets from hidden states.
    """
    from kdcache.config import load
    from kdcache.transcode import TranscodeConfig, preview_transcoding, transcode_cache

    if given["drop_hidden"] and given["layers"] is not None:
        raise click.UsageError("--drop-hidden and --layers exclude each other")
    own = {
        "source": source,
        "output": output,
        "hidden_states.layers": [] if given["drop_hidden"] else given["layers"],
        **{name: given[name] for name in ("where", "limit_sequences", "device")},
    }
    nested = options.nest({**settings.of_targets(given), **own})
    config = load(TranscodeConfig, file=config_file, assignments=assignments, options=nested)
    if dry_run:
        estimate = preview_transcoding(config)
        if as_json:
            options.echo_json(estimate.to_dict())
        else:
            _echo_estimate(estimate)
        return
    result = transcode_cache(config, check=not no_verify, progress=not quiet)
    if as_json:
        options.echo_json(result.to_dict())
    else:
        _echo_result(result)


def _echo_result(result: Any) -> None:
    manifest, speed = result.manifest, result.num_positions_written / max(result.elapsed_s, 1e-9)
    checked = " Every byte was read again and is as written." if result.verified else ""
    if result.num_positions_written == 0:
        click.echo(f"{result.output} is complete already; nothing was written.{checked}")
        return
    click.echo(
        f"Wrote {result.num_positions_written:,} positions in {result.num_shards_written} shards to {result.output}: "
        f"{options.human_bytes(manifest.num_bytes)}, {manifest.bytes_per_token:.1f} bytes/token (source "
        f"{result.source_bytes_per_token:.1f}), {speed:,.0f} tokens/s.{checked}"
    )


def _echo_estimate(estimate: Any) -> None:
    rows: list[tuple[str, Any]] = [
        ("targets", ", ".join(f"{name} {value}" for name, value in estimate.targets.items() if value)),
        ("sequences", f"{estimate.num_sequences:,} of {estimate.source_num_sequences:,}"),
        ("positions", f"{estimate.num_positions:,} of {estimate.source_num_positions:,}"),
        ("shards", f"{estimate.num_shards:,} ({estimate.num_shards_committed:,} written already)"),
        ("kept mass", f"{estimate.kept_mass:.4f} (pilot)"),
        ("bytes/token", f"{estimate.bytes_per_token:.1f} (pilot; source {estimate.source_bytes_per_token:.1f})"),
        *((f"  {name}", f"{size:.1f}") for name, size in estimate.field_bytes_per_token.items()),
        ("size", options.human_bytes(estimate.total_bytes)),
    ]
    options.echo_rows(rows)
    click.echo(f"Nothing was written; run it without --dry-run to fill {estimate.output}.")
