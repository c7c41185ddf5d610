"""``kdcache evaluate``."""

from __future__ import annotations

from typing import Any, Literal

import click

from kdcache import terminal
from kdcache.cli import options

_EPILOG = """\b
Examples:
  kdcache evaluate --cache held-out-cache --student run
  kdcache evaluate --cache held-out-cache --student run-ce --student run-kd --markdown
  kdcache train-student --cache cache --where "sequence % 10 > 0" --student-size tiny --output run
  kdcache evaluate --cache cache --where "sequence % 10 == 0" --student run
"""


@click.command("evaluate", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.option(
    "--cache", required=True, metavar="CACHE", help="Held-out cache: documents that no student was trained on."
)
@click.option(
    "--student", "students", multiple=True, metavar="RUN", help="Student: directory or Hugging Face id. Repeatable."
)
@click.option("--batch-tokens", default=8192, show_default=True, help="Tokens per forward pass, padding included.")
@click.option("--where", metavar="FILTER", help="Evaluate only sequences that match, such as sequence % 10 == 0.")
@click.option(
    "--limit-sequences", type=int, help="Evaluate this many sequences, spread over those chosen.  [default: all]"
)
@click.option(
    "--qrels", metavar="FILE", help="Relevant documents per query, for retrieval with embeddings: BEIR or TREC format."
)
@click.option("--id-column", metavar="NAME", help="Column with the ids that --qrels uses.  [default: document_id]")
@click.option(
    "--generate", type=int, metavar="N", help="Generate N texts with students of seq2seq-lm; report chrF and ROUGE-L."
)
@click.option("--beams", default=1, show_default=True, help="Beams for --generate; 1 is greedy.")
@click.option("--device", default="auto", show_default=True, help="Device: cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision of the students.",
)
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@options.json_option
@options.quiet_option
def command(
    cache: str,
    students: tuple[str, ...],
    batch_tokens: int,
    where: str | None,
    limit_sequences: int | None,
    qrels: str | None,
    id_column: str | None,
    generate: int | None,
    beams: int,
    device: str,
    dtype: Literal["float32", "bfloat16"],
    markdown: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare students with the teacher on a held-out cache.

    Metrics: loss and perplexity on the corpus, KL from the teacher in nats, agreement (share of positions where both
    have the same top-1), top-1 accuracy, expected calibration error (ECE), size and speed. The teacher's metrics come
    from the cache. A student that was trained on some of the sequences gets a warning with their number.

    Embeddings: rank correlation of the cosines of pairs with their labels, and mean cosine to the teacher; with --qrels
    also nDCG@10, recall@10, recall@100 and MRR@10 of retrieving the documents of the cache for its queries.

    With --generate, students of seq2seq-lm generate texts for inputs spread over the cache; chrF and ROUGE-L (0 to 100)
    compare them with the gold targets.
    """
    from kdcache.evaluate import evaluate_students

    evaluation: Any = evaluate_students(
        cache,
        list(students),
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        where=where,
        limit_sequences=limit_sequences,
        qrels=qrels,
        id_column=id_column,
        generate=generate,
        beams=beams,
        progress=not quiet,
    )
    if as_json:
        terminal.echo_json(evaluation.to_dict())
    else:
        terminal.echo(evaluation.table(markdown=markdown))
