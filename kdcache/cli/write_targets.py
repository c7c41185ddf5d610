"""``kdcache write-targets``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cli import options, settings

_EPILOG = """\b
Examples:
  kdcache write-targets --teacher google/flan-t5-base --prefix 'summarize: ' --corpus texts.jsonl \\
      --text-field body --output written.jsonl --dry-run
  kdcache write-targets --teacher ./teacher --corpus texts.jsonl --sample --top-p 0.9 --output written.jsonl
  kdcache dump-teacher --task seq2seq-lm --teacher ./teacher --corpus written.jsonl --output cache

A run that was interrupted goes on where it stopped when the same command runs again.
"""

_SETTINGS = {
    "output": "output",
    "teacher.model": "teacher",
    "teacher.dtype": "dtype",
    "teacher.device": "device",
    "teacher.revision": "revision",
    "corpus.paths": "corpus",
    "corpus.text_field": "text_field",
    "corpus.limit_documents": "limit_documents",
    "sequences.max_length": "max_length",
    "sequences.max_target_length": "max_target_length",
    "sequences.prefix": "prefix",
    "writing.beams": "beams",
    "writing.sample": "sample",
    "writing.temperature": "temperature",
    "writing.top_p": "top_p",
    "writing.seed": "seed",
    "batch_tokens": "batch_tokens",
}


@click.command("write-targets", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.option("--teacher", metavar="ID_OR_PATH", help="Hub id or local directory of an encoder-decoder (T5, BART).")
@click.option(
    "--corpus",
    multiple=True,
    metavar="PATH",
    help="A .jsonl or .parquet file, a directory, a glob, or hf:NAME[:CONFIG][@SPLIT]. Repeatable.",
)
@click.option("--output", metavar="FILE", help="A .jsonl file, one line per document.")
@click.option("--text-field", help="Field or column that holds the input.  [default: input]")
@click.option(
    "--column",
    multiple=True,
    metavar="ROLE=NAME",
    help="Column of the corpus's own targets, such as target=summary: kept as reference. Repeatable.",
)
@click.option("--prefix", help="Text before every input, such as 'summarize: '.")
@click.option("--beams", type=int, help="Beams of the search; 1 is greedy.  [default: 4]")
@click.option("--sample", is_flag=True, default=None, help="Draw texts from the teacher's distribution instead.")
@click.option("--temperature", type=float, help="Of the distribution that is drawn from.  [default: 1]")
@click.option("--top-p", type=float, help="Draw from the fewest tokens with this probability.  [default: 1]")
@click.option("--seed", type=int, help="Of the samples.  [default: 0]")
@click.option("--max-length", type=int, help="Tokens of an input; longer ones are cut.  [default: 512]")
@click.option("--max-target-length", type=int, help="Most tokens of a text.  [default: 128]")
@click.option("--limit-documents", type=int, help="Use only the first documents.")
@click.option("--batch-tokens", type=int, help="Tokens of inputs that are read at once.  [default: 8192]")
@click.option("--dtype", help="float32, bfloat16 or float16.  [default: the checkpoint's own]")
@click.option("--device", help="cpu, cuda, cuda:1, mps.  [default: the best there is]")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@options.config_options
@click.option("--dry-run", is_flag=True, help="Write a few texts, print them, speed and ETA; leave the file alone.")
@options.json_option
@options.quiet_option
def command(
    config_file: str | None, assignments: tuple[str, ...], dry_run: bool, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Let an encoder-decoder write a target for every input of a corpus (sequence-level distillation).

    The result is a corpus of JSON lines, in order: the input, the teacher's text as target, the corpus's own target as
    reference if it has one, and all other columns. Dump it like any other corpus. Beside it FILE.settings.json says
    who wrote it and how.
    """
    from kdcache.config import load
    from kdcache.write import WriteConfig, preview_targets, write_targets

    named = {setting: given[option] for setting, option in _SETTINGS.items()}
    nested = options.nest({**named, **settings.of_columns(given["column"])})
    config = load(WriteConfig, file=config_file, assignments=assignments, options=nested)
    if dry_run:
        _echo_estimate(preview_targets(config), as_json)
        return
    result = write_targets(config, progress=not quiet)
    if as_json:
        options.echo_json(result.to_dict())
        return
    _echo_result(result)


def _echo_estimate(estimate: Any, as_json: bool) -> None:
    if as_json:
        options.echo_json(estimate.to_dict())
        return
    for example in estimate.examples:
        click.echo(f"input      {' '.join(example['input'].split())[:200]}\ntarget     {example['target']}\n")
    options.echo_rows(
        [
            ("documents", f"{estimate.num_documents:,} ({estimate.num_done:,} written already)"),
            ("cut inputs", f"{estimate.pilot.num_cut_inputs:,} of {estimate.num_pilot:,} (pilot)"),
            ("cut targets", f"{estimate.pilot.num_cut_targets:,} of {estimate.num_pilot:,} (pilot)"),
            ("speed", f"{estimate.tokens_per_s:,.0f} tokens/s (pilot)"),
            ("time", options.human_seconds(estimate.eta_s)),
        ]
    )
    click.echo(f"Nothing was written; run it without --dry-run to fill {estimate.output}.")


def _echo_result(result: Any) -> None:
    counts = result.counts
    if counts.num_written == 0:
        click.echo(f"{result.output} is complete already; nothing was written.")
        return
    click.echo(
        f"Wrote {counts.num_written:,} of {result.num_documents:,} lines to {result.output}: {counts.num_tokens:,} "
        f"tokens, {counts.num_tokens / max(result.seconds, 1e-9):,.0f} tokens/s."
    )
    for number, words in (
        (counts.num_empty, "documents have no input; their target is null, and a dump leaves them out"),
        (counts.num_cut_inputs, "inputs were cut to --max-length"),
        (counts.num_cut_targets, "texts were stopped at --max-target-length, before their end"),
    ):
        if number:
            click.echo(f"{number:,} {words}.")
