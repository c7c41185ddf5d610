"""``kdcache write-targets``."""

from __future__ import annotations

from typing import Any

import click

from kdcache import terminal
from kdcache.cli import options, settings
from kdcache.words import count

_EPILOG = """\b
Examples:
  kdcache write-targets --teacher google/flan-t5-base --prefix 'summarize: ' --corpus texts.jsonl \\
      --text-field body --output written.jsonl --dry-run
  kdcache write-targets --teacher ./teacher --corpus texts.jsonl --sample --top-p 0.9 --output written.jsonl
  kdcache dump-teacher --task seq2seq-lm --teacher ./teacher --corpus written.jsonl --output cache

To resume an interrupted run, run the same command again.
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
@click.option(
    "--teacher", metavar="ID_OR_PATH", help="Encoder-decoder teacher (T5, BART): Hugging Face id or local directory."
)
@click.option(
    "--corpus",
    multiple=True,
    metavar="PATH",
    help="Documents: a .jsonl or .parquet file, a directory, a glob, or hf:NAME[:CONFIG][@SPLIT]. Repeatable.",
)
@click.option("--output", metavar="FILE", help="Output file, .jsonl, one line per document.")
@click.option("--text-field", help="Field or column with the input.  [default: input]")
@click.option(
    "--column",
    multiple=True,
    metavar="ROLE=NAME",
    help="Column with the corpus's own targets, such as target=summary; kept as reference. Repeatable.",
)
@click.option("--prefix", help="Prepend this text to every input, such as 'summarize: '.  [default: none]")
@click.option("--beams", type=int, help="Beams of the beam search; 1 is greedy.  [default: 4]")
@click.option("--sample", is_flag=True, default=None, help="Sample from the teacher instead of searching.")
@click.option("--temperature", type=float, help="Sampling temperature.  [default: 1]")
@click.option(
    "--top-p", type=float, help="Sample from the fewest top tokens that reach this total probability.  [default: 1]"
)
@click.option("--seed", type=int, help="Seed of the sampling.  [default: 0]")
@click.option("--max-length", type=int, help="Tokens per input; longer inputs are truncated.  [default: 512]")
@click.option("--max-target-length", type=int, help="Tokens per generated text, at most.  [default: 128]")
@click.option("--limit-documents", type=int, help="Read only the first documents.  [default: all]")
@click.option("--batch-tokens", type=int, help="Input tokens per batch.  [default: 8192]")
@click.option(
    "--dtype", help="Precision of the teacher: float32, bfloat16 or float16.  [default: as in the checkpoint]"
)
@click.option("--device", help="Device: cpu, cuda, cuda:1, mps.  [default: a GPU if there is one]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.  [default: main]")
@options.config_options
@click.option(
    "--dry-run", is_flag=True, help="Generate a few texts, print them with speed and duration; write nothing."
)
@options.json_option
@options.quiet_option
def command(
    config_file: str | None, assignments: tuple[str, ...], dry_run: bool, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Generate a target for every input of a corpus with an encoder-decoder teacher (sequence-level distillation).

    FILE is a corpus for dump-teacher. Each line has the input, the teacher's text as target, the corpus's own target
    as reference if it has one, and all other columns. FILE.settings.json records the teacher and the settings.
    """
    from kdcache.config import load
    from kdcache.write import WriteConfig, preview_targets, write_targets

    named = {setting: given[option] for setting, option in _SETTINGS.items()}
    nested = options.settings_tree({**named, **settings.of_columns(given["column"])})
    config = load(WriteConfig, file=config_file, assignments=assignments, options=nested)
    if dry_run:
        _echo_estimate(preview_targets(config), as_json)
        return
    result = write_targets(config, progress=not quiet)
    if as_json:
        terminal.echo_json(result.to_dict())
        return
    _echo_result(result)


def _echo_estimate(estimate: Any, as_json: bool) -> None:
    if as_json:
        terminal.echo_json(estimate.to_dict())
        return
    for example in estimate.examples:
        terminal.echo(f"input      {' '.join(example['input'].split())[:200]}\ntarget     {example['target']}\n")
    terminal.echo_rows(
        [
            ("documents", f"{estimate.num_documents:,} ({estimate.num_done:,} written already)"),
            ("truncated inputs", f"{estimate.pilot.num_cut_inputs:,} of {estimate.num_pilot:,} (pilot)"),
            ("truncated targets", f"{estimate.pilot.num_cut_targets:,} of {estimate.num_pilot:,} (pilot)"),
            ("speed", f"{estimate.tokens_per_s:,.0f} tokens/s (pilot)"),
            ("time", options.human_seconds(estimate.eta_s)),
        ]
    )
    terminal.echo(f"Nothing was written; run it without --dry-run to fill {estimate.output}.")


def _echo_result(result: Any) -> None:
    counts = result.counts
    if counts.num_written == 0:
        terminal.echo(f"{result.output} is complete already; nothing was written.")
        return
    terminal.echo(
        f"Wrote {count(counts.num_written, 'line', of=result.num_documents)} to {result.output}: {counts.num_tokens:,} "
        f"tokens, {counts.num_tokens / max(result.seconds, 1e-9):,.0f} tokens/s."
    )
    for number, words, noun in (
        (counts.num_empty, "Without an input, so with a target of null, which dump-teacher skips", "document"),
        (counts.num_cut_inputs, "Truncated to --max-length", "input"),
        (counts.num_cut_targets, "Stopped at --max-target-length", "text"),
    ):
        if number:
            terminal.echo(f"{words}: {count(number, noun)}.")
