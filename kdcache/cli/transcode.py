"""``kdcache transcode``."""

from __future__ import annotations

from typing import Any

import click

from kdcache import terminal
from kdcache.cli import options, settings
from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS
from kdcache.schema import KINDS
from kdcache.words import count

_EPILOG = """\b
Examples:
  kdcache transcode cache small --top-k 32
  kdcache transcode cache smaller --min-prob 0.001 --codec compact --no-hidden-states
  kdcache transcode cache coarse --set targets.codec.grid=8
  kdcache transcode cache easy --where "teacher_loss < 5 and num_positions >= 64"
  kdcache transcode cache tenth --where "sequence % 10 == 0 and source in ['wiki', 'books']"
  kdcache transcode hidden-cache top-64 --targets top-k --temperatures 0.5,2
  kdcache transcode hidden-cache sampled --targets sampled --samples 50

Settings that are not given stay as in SRC; with another kind of --targets they are the defaults of a dump of that
kind. kdcache inspect shows the settings of SRC.

A cache of kept ids can become one of fewer ids. Samples stay as they are. A cache of the kind hidden can become any
kind; it then keeps its last hidden state only if --hidden-states names it. Tail mass, entropy and the gold token stay
exact. The tail prior stays exact too, unless --where or --limit-sequences selects sequences: then it is that of SRC.
In --where, put column names that are not plain words in `backquotes`.

To resume an interrupted transcoding, run the same command again.
"""


@click.command("transcode", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.argument("source", metavar="SRC")
@click.argument("output", metavar="DST")
@click.option("--targets", type=click.Choice(KINDS), help="Change the kind of targets; SRC must be of the kind hidden.")
@click.option("--top-k", type=int, help="Keep at most this many ids per position; the others go to the tail.")
@click.option("--min-prob", type=float, help="Drop ids below this probability, except the most probable one.")
@click.option("--min-mass", type=float, help="Keep the fewest top ids that reach this total probability.")
@click.option("--samples", type=int, help="Samples per position, with --targets sampled or hybrid.")
@click.option("--temperatures", metavar="T,T,...", help="Keep the tail mass at these temperatures; '' for none.")
@click.option("--tail-prior/--no-tail-prior", default=None, help="Store the mean tail distribution, once per cache.")
@click.option("--codec", type=click.Choice(list(TOPK_CODECS)), help="Encoding of kept ids and log-probabilities.")
@click.option(
    "--hidden-states", "layers", metavar="LAYERS", help="Keep only the hidden states of these layers, such as last,12."
)
@click.option(
    "--no-hidden-states",
    "drop_hidden",
    is_flag=True,
    help="Drop all hidden states, except the last one of the kind hidden.",
)
@click.option("--hidden-codec", type=click.Choice(list(VECTOR_CODECS)), help="Encoding of hidden states.")
@click.option("--where", metavar="FILTER", help="Keep only sequences that match, such as teacher_loss < 5.")
@click.option("--limit-sequences", type=int, help="Keep only the first sequences, after --where.  [default: all]")
@click.option("--device", help="Device of the LM head, for SRC of the kind hidden.  [default: a GPU if there is one]")
@options.config_options
@click.option("--dry-run", is_flag=True, help="Print the settings and the size of DST; write nothing.")
@click.option("--no-verify", is_flag=True, help="Skip the check of all hashes of DST at the end.")
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

    DST may keep fewer ids, use another codec, drop hidden states or hold a part of the sequences. From a cache of the
    kind hidden, it may hold any kind of targets. SRC is not changed. Only targets from hidden states need torch.
    """
    from kdcache.config import load
    from kdcache.transcode import TranscodeConfig, preview_transcoding, transcode_cache

    if given["drop_hidden"] and given["layers"] is not None:
        raise click.UsageError("--no-hidden-states and --hidden-states exclude each other; give one of them")
    own = {
        "source": source,
        "output": output,
        "hidden_states.layers": [] if given["drop_hidden"] else given["layers"],
        **{name: given[name] for name in ("where", "limit_sequences", "device")},
    }
    nested = options.settings_tree({**settings.of_targets(given), **own})
    config = load(TranscodeConfig, file=config_file, assignments=assignments, options=nested)
    if dry_run:
        estimate = preview_transcoding(config)
        if as_json:
            terminal.echo_json(estimate.to_dict())
        else:
            _echo_estimate(estimate)
        return
    result = transcode_cache(config, check=not no_verify, progress=not quiet)
    if as_json:
        terminal.echo_json(result.to_dict())
    else:
        _echo_result(result)


def _echo_result(result: Any) -> None:
    manifest, speed = result.manifest, result.num_positions_written / max(result.elapsed_s, 1e-9)
    checked = " Every byte was read again and is as written." if result.verified else ""
    if result.num_positions_written == 0:
        terminal.echo(f"{result.output} is complete already; nothing was written.{checked}")
        return
    terminal.echo(
        f"Wrote {count(result.num_positions_written, 'position')} in {count(result.num_shards_written, 'shard')} "
        f"to {result.output}: {options.human_bytes(manifest.num_bytes)}, {manifest.bytes_per_token:.1f} bytes/token "
        f"(source {result.source_bytes_per_token:.1f}), {speed:,.0f} tokens/s.{checked}"
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
    terminal.echo_rows(rows)
    terminal.echo(f"Nothing was written; run it without --dry-run to fill {estimate.output}.")
