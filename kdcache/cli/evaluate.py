"""``kdcache evaluate``."""

from __future__ import annotations

from typing import Any, Literal

import click

from kdcache.cli import options

_EPILOG = """\b
Examples:
  kdcache evaluate --cache held-out-cache --student run
  kdcache evaluate --cache held-out-cache --student run-ce --student run-kd --markdown
"""


@click.command("evaluate", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.option("--cache", required=True, metavar="CACHE", help="A cache of texts that no student was trained on.")
@click.option("--student", "students", multiple=True, metavar="RUN", help="A student: directory or hub id. Repeatable.")
@click.option("--batch-tokens", default=8192, show_default=True, help="Tokens per forward pass, padding included.")
@click.option("--limit-sequences", type=int, help="Use only that many sequences, spread over the cache.")
@click.option("--qrels", metavar="FILE", help="Relevant documents of queries, for search by embeddings: BEIR or TREC.")
@click.option("--id-column", metavar="NAME", help="Column with the ids of --qrels.  [default: document_id]")
@click.option("--generate", type=int, metavar="N", help="Let students of seq2seq-lm write N texts; chrF and ROUGE-L.")
@click.option("--beams", default=1, show_default=True, help="Beams of --generate; 1 is greedy.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="Of the students."
)
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@options.json_option
@options.quiet_option
def command(
    cache: str,
    students: tuple[str, ...],
    batch_tokens: int,
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

    Loss and perplexity on the corpus, KL from the teacher, how often both favour the same token (agreement), accuracy,
    expected calibration error (ECE), size and speed. The teacher's row comes from the cache alone.

    Of embeddings: the rank correlation of the cosines of pairs with their labels, the mean cosine to the teacher, and
    with --qrels nDCG@10, recall@10 and @100 and MRR@10 of searching all documents of the cache for its queries.

    With --generate, students of task seq2seq-lm write texts for inputs spread over the cache, which chrF and ROUGE-L (0
    to 100) compare with the corpus's own targets.
    """
    from kdcache.evaluate import evaluate_students

    evaluation: Any = evaluate_students(
        cache,
        list(students),
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        limit_sequences=limit_sequences,
        qrels=qrels,
        id_column=id_column,
        generate=generate,
        beams=beams,
        progress=not quiet,
    )
    if as_json:
        options.echo_json(evaluation.to_dict())
    else:
        click.echo(evaluation.table(markdown=markdown))
