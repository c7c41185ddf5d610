"""``kdcache dump-teacher``."""

from __future__ import annotations

from typing import Any

import click

from kdcache import terminal
from kdcache.cli import options, settings
from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS
from kdcache.presets import PRESETS
from kdcache.schema import KINDS
from kdcache.tasks import TASKS
from kdcache.words import count

_EPILOG = """\b
Examples:
  kdcache dump-teacher --teacher HuggingFaceTB/SmolLM2-135M --corpus texts/ --output cache --dry-run
  kdcache dump-teacher --teacher ./teacher.gguf --corpus 'data/*.jsonl' --text-field body --output cache
  kdcache dump-teacher --config dump.yaml --set targets.codec.grid=32
  kdcache dump-teacher --task sequence-classification --teacher CLASSIFIER --corpus reviews.jsonl --output cache

To resume an interrupted dump, run the same command again.
"""


@click.command("dump-teacher", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.option("--teacher", metavar="ID_OR_PATH", help="Teacher model: Hugging Face id, local directory or .gguf file.")
@click.option(
    "--backend",
    metavar="NAME",
    help="Run the teacher with this backend; installed packages may add some.  [default: transformers]",
)
@click.option(
    "--corpus",
    multiple=True,
    metavar="PATH",
    help="Documents: a .txt, .jsonl, .csv or .parquet file, a directory, a glob, or hf:NAME[:CONFIG][@SPLIT]. "
    "Repeatable.",
)
@click.option("--output", metavar="CACHE", help="Directory or URL of the new cache.")
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    help="Task of the teacher; it defines what one position is. "
    + "; ".join(f"{name}: {task.summary}" for name, task in TASKS.importable().items())
    + ".  "
    "[default: causal-lm]",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Start from settings that work well together; kdcache estimate compares them.",
)
@click.option(
    "--targets",
    type=click.Choice(KINDS),
    help="Store per position: the top-k ids, samples, both (hybrid), the last hidden state, or raw outputs only.  "
    "[default: top-k]",
)
@click.option("--top-k", type=int, help="Keep at most this many ids per position.  [default: 64; hybrid 4; hidden 1]")
@click.option(
    "--min-prob", type=float, help="Drop ids below this probability, except the most probable one.  [default: 0]"
)
@click.option("--min-mass", type=float, help="Keep the fewest top ids that reach this total probability.  [default: 1]")
@click.option("--samples", type=int, help="Samples per position.  [default: 50; hybrid 16]")
@click.option(
    "--temperatures", metavar="T,T,...", help="Also store the tail mass at these temperatures.  [default: none]"
)
@click.option(
    "--tail-prior/--no-tail-prior",
    default=None,
    help="Store the mean tail distribution, once per cache.  [default: on for top-k]",
)
@click.option(
    "--codec",
    type=click.Choice(list(TOPK_CODECS)),
    help="Encoding of kept ids and log-probabilities.  [default: compact]",
)
@click.option(
    "--hidden-states",
    metavar="LAYERS",
    help="Also store the hidden states of these layers, such as last,12.  [default: none]",
)
@click.option(
    "--hidden-codec", type=click.Choice(list(VECTOR_CODECS)), help="Encoding of hidden states.  [default: bf16]"
)
@click.option(
    "--outputs-codec",
    type=click.Choice(list(VECTOR_CODECS)),
    help="Encoding of raw outputs: embeddings, scores, logits of classes.  [default: exact]",
)
@click.option(
    "--max-length",
    type=int,
    help="Tokens per sequence; longer documents are split or truncated.  [default: 512, or that of the task]",
)
@click.option("--pack", is_flag=True, help="Fill sequences with several documents, which do not attend to each other.")
@click.option("--text-field", help="Field or column with the text.  [default: text]")
@click.option(
    "--column",
    multiple=True,
    metavar="ROLE=NAME",
    help="Column with another input or the label of a task, such as label=sentiment. Repeatable.",
)
@click.option(
    "--split-text",
    type=click.Choice(["file", "paragraph", "line"]),
    help="What one document of a .txt file is; a whole file may have up to 64 MB.  [default: file]",
)
@click.option(
    "--leave-out", multiple=True, metavar="COLUMN", help="Do not keep this column as metadata of sequences. Repeatable."
)
@click.option("--limit-documents", type=int, help="Read only the first documents.  [default: all]")
@click.option(
    "--batch-tokens", type=int, help="Tokens per forward pass, padding included.  [default: 4096 on a CPU, else 16384]"
)
@click.option(
    "--dtype", help="Precision of the teacher: float32, bfloat16 or float16.  [default: as in the checkpoint]"
)
@click.option("--device", help="Device: cpu, cuda, cuda:1, mps.  [default: a GPU if there is one]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.  [default: main]")
@options.config_options
@click.option(
    "--dry-run", is_flag=True, help="Time a pilot and print the size and duration of the dump; write nothing."
)
@options.json_option
@options.quiet_option
def command(
    config_file: str | None, assignments: tuple[str, ...], dry_run: bool, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Run a teacher over a corpus once and store its predictions in a cache.

    Per position the cache stores the top-k ids with their log-probabilities, the exact tail mass, the log-probability
    of the gold token and the entropy; with --hidden-states also hidden states. --targets chooses other kinds: samples
    need the fewest bytes; the last hidden state with the teacher's LM head needs the most, and gives the whole
    distribution at any temperature. kdcache estimate compares them on your corpus.
    """
    from kdcache.config import load, merge
    from kdcache.dump import DumpConfig, dump_teacher, preview_dump

    own = {
        "hidden_states.layers": given["hidden_states"],
        "outputs.codec": given["outputs_codec"],
        "output": given["output"],
        "teacher.backend": given["backend"],
    }
    nested = options.settings_tree({**settings.of_sources(given), **settings.of_targets(given), **own})
    if given["preset"] is not None:
        nested = merge(dict(PRESETS[given["preset"]].settings), nested)
    config = load(DumpConfig, file=config_file, assignments=assignments, options=nested)
    if dry_run:
        estimate = preview_dump(config, progress=not quiet)
        if as_json:
            terminal.echo_json(estimate.to_dict())
        else:
            _echo_estimate(estimate)
        return
    result = dump_teacher(config, progress=not quiet)
    manifest = result.manifest
    if as_json:
        terminal.echo_json(
            {
                "output": result.output,
                "num_positions": manifest.num_positions,
                "num_positions_written": result.num_positions_written,
                "num_shards": manifest.num_shards,
                "num_shards_written": result.num_shards_written,
                "num_bytes": manifest.num_bytes,
                "bytes_per_token": manifest.bytes_per_token,
                "teacher_s": result.teacher_s,
                "tokens_per_s": result.num_positions_written / max(result.teacher_s, 1e-9),
            }
        )
        return
    if result.num_positions_written == 0:
        terminal.echo(f"{result.output} is complete already; nothing was written.")
        return
    unit = TASKS[manifest.task].unit
    written = count(result.num_positions_written, "position" if unit == "token" else "row")
    terminal.echo(
        f"Wrote {written} in {count(result.num_shards_written, 'shard')} to {result.output}: "
        f"{options.human_bytes(manifest.num_bytes)}, {manifest.bytes_per_token:.1f} bytes/{unit}, "
        f"{result.num_positions_written / max(result.teacher_s, 1e-9):,.0f} {unit}s/s."
    )
    corpus = manifest.corpus
    short = "of a single token" if manifest.task == "causal-lm" else "too short"
    if corpus.num_empty or corpus.num_too_short:
        terminal.echo(
            f"Left out of {count(corpus.num_documents, 'document')}: {corpus.num_empty:,} empty, "
            f"{corpus.num_too_short:,} {short}."
        )
    if corpus.num_truncated:
        terminal.echo(f"Truncated to --max-length: {count(corpus.num_truncated, 'document')}.")


def _echo_estimate(estimate: Any) -> None:
    terminal.echo_rows(
        [
            (
                "documents",
                f"{estimate.num_documents:,} ({estimate.num_empty:,} empty, {estimate.num_too_short:,} short)",
            ),
            ("sequences", f"{estimate.num_sequences:,}"),
            ("positions", f"{estimate.num_positions:,}"),
            ("shards", f"{estimate.num_shards:,} ({estimate.num_shards_committed:,} written already)"),
            ("bytes/token", f"{estimate.bytes_per_token:.1f} (pilot)"),
            ("size", options.human_bytes(estimate.total_bytes)),
            *options.known_row("kept mass", estimate.kept_mass, ".3f", " (pilot)"),
            *options.known_row("teacher loss", estimate.teacher_loss, ".3f", " nats (pilot)"),
            ("speed", f"{estimate.tokens_per_s:,.0f} tokens/s (pilot)"),
            ("time", options.human_seconds(estimate.eta_s)),
        ]
    )
    terminal.echo(f"Nothing was written; run it without --dry-run to fill {estimate.output}.")
