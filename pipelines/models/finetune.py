"""Fine-tune a teacher that no package ships: a classifier (or a regressor) of texts, or a cross-encoder that ranks.

    python pipelines/models/finetune.py classifier --model MINILM --train train.jsonl --eval dev.jsonl --output TEACHER
    python pipelines/models/finetune.py cross-encoder --model MINILM --train train.jsonl --output TEACHER

A plain PyTorch loop without kdcache, which only reads what this writes: a Hugging Face model directory of
``AutoModelForSequenceClassification`` with its tokenizer. Both commands share the loop and differ in how a batch is
made and what its loss is. Texts of like length go into one batch, which halves the time on short texts.

Rows of a classifier: ``text``, ``label`` (a name, or a number with --regression) and optionally ``text_pair``.
Rows of a cross-encoder: ``query``, ``documents`` and ``relevance``, one number per document, more than 0 is relevant.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

Row = dict[str, Any]


def classifier(arguments: argparse.Namespace) -> None:
    """Fine-tune on labelled texts or pairs and print how good the model is on the rows of --eval."""
    rows, held_out = read_rows(arguments.train), read_rows(arguments.eval) if arguments.eval else []
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    names = [] if arguments.regression else sorted({str(row["label"]) for row in rows})
    targets_of = numbers if arguments.regression else ids_of(names)
    target_N = targets_of(held_out)  # before the training: a label that cannot be used should be known now
    model = load(arguments, head(names))

    def inputs(batch: list[Row]) -> Any:
        texts = [[row[field] for row in batch] for field in ("text", "text_pair") if field in batch[0]]
        limits = {"truncation": True, "max_length": arguments.max_length, "padding": True}
        return tokenizer(*texts, **limits, return_tensors="pt")

    def loss(batch: list[Row]) -> torch.Tensor:
        return model(**inputs(batch), labels=targets_of(batch)).loss

    fit(model, rows, loss, lambda row: len(row["text"]) + len(row.get("text_pair", "")), arguments)
    save(model, arguments)
    if held_out:
        with torch.inference_mode():
            batches = [held_out[i : i + 64] for i in range(0, len(held_out), 64)]
            logits_NC = torch.cat([model(**inputs(batch)).logits for batch in batches])
        print((correlation if arguments.regression else accuracy)(logits_NC, target_N))


def head(names: list[str]) -> dict[str, Any]:
    """Return what transformers wants to know of a head: the names of its classes, or that it has one output."""
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    ids = {name: index for index, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": ids, "problem_type": "single_label_classification"}


def numbers(rows: list[Row]) -> torch.Tensor:
    """Return the labels of a regression, as they are."""
    if strange := [row["label"] for row in rows if not isinstance(row["label"], int | float)]:
        sys.exit(f"--regression expects numbers as labels and found {strange[0]!r}")
    return torch.tensor([float(row["label"]) for row in rows])


def ids_of(names: list[str]) -> Callable[[list[Row]], torch.Tensor]:
    """Return the function that turns the labels of rows into the ids of classes."""

    def targets(rows: list[Row]) -> torch.Tensor:
        labels = [str(row["label"]) for row in rows]
        if strange := set(labels) - set(names):
            sys.exit(f"labels to evaluate on that the training has not: {', '.join(sorted(strange))}")
        return torch.tensor([names.index(label) for label in labels])

    return targets


def accuracy(logits_NC: torch.Tensor, target_N: torch.Tensor) -> str:
    """Return the share of rows whose class has the highest logit."""
    return f"accuracy {(logits_NC.argmax(-1) == target_N).double().mean():.4f} on {len(target_N)} rows"


def correlation(logits_NC: torch.Tensor, target_N: torch.Tensor) -> str:
    """Return how the outputs correlate with the labels, and how their ranks do (ties share their mean rank)."""
    both_2N = torch.stack([logits_NC[:, 0].double(), target_N.double()])
    pearson, spearman = (float(torch.corrcoef(values)[0, 1]) for values in (both_2N, ranks(both_2N)))
    return f"Pearson {pearson:.4f}, Spearman {spearman:.4f} on {len(target_N)} rows"


def ranks(values_2N: torch.Tensor) -> torch.Tensor:
    """Return the rank of every value in its row, where equal values share the mean of their ranks."""
    below_and_equal = [(v.unsqueeze(1) > v).sum(1) + ((v.unsqueeze(1) == v).sum(1) - 1) / 2 for v in values_2N]
    return torch.stack(below_and_equal).double()


def cross_encoder(arguments: argparse.Namespace) -> None:
    """Fine-tune one logit per pair of query and document, so that a relevant document wins against the others."""
    rows = [example for row in read_rows(arguments.train) for example in lists_of(row, arguments.documents)]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load(arguments, {"num_labels": 1})

    def loss(batch: list[Row]) -> torch.Tensor:
        inputs = tokenizer(
            [row["query"] for row in batch for _ in row["documents"]],
            [document for row in batch for document in row["documents"]],
            truncation="only_second",
            max_length=arguments.max_length,
            padding=True,
            return_tensors="pt",
        )
        logits_BC = model(**inputs).logits.view(len(batch), -1)
        return functional.cross_entropy(logits_BC, torch.zeros(len(batch), dtype=torch.long))

    fit(model, rows, loss, lambda row: sum(map(len, row["documents"])), arguments)
    save(model, arguments)


def lists_of(row: Row, num_documents: int) -> list[Row]:
    """Return one list per relevant document: that document first, then the first negatives of the row."""
    pairs = list(zip(row["documents"], row["relevance"], strict=True))
    negatives = [document for document, relevance in pairs if relevance <= 0][: num_documents - 1]
    if len(negatives) < num_documents - 1:
        sys.exit(f"query {row['query']!r} has {len(negatives)} negatives; --documents {num_documents} needs one less")
    relevant = [document for document, relevance in pairs if relevance > 0]
    return [{"query": row["query"], "documents": [document, *negatives]} for document in relevant]


def fit(
    model: Any,
    rows: list[Row],
    loss: Callable[[list[Row]], torch.Tensor],
    length: Callable[[Row], int],
    arguments: argparse.Namespace,
) -> None:
    """Train ``model`` in place; the rate rises over a tenth of the steps and falls linearly. Leaves it in eval mode."""
    rng = random.Random(arguments.seed)
    batches = [batch for _ in range(arguments.epochs) for batch in shuffled(rows, arguments.batch_size, length, rng)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
    schedule = get_scheduler("linear", optimizer, len(batches) // 10, len(batches))
    model.train()
    progress = tqdm(batches, unit="step", mininterval=5)
    for batch in progress:
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    model.eval()


def shuffled(rows: list[Row], size: int, length: Callable[[Row], int], rng: random.Random) -> list[list[Row]]:
    """Return all rows in batches of random order: sorted by length within stretches of 32 batches, then shuffled."""
    order = rng.sample(rows, len(rows))
    stretches = [sorted(order[i : i + 32 * size], key=length) for i in range(0, len(order), 32 * size)]
    batches = [stretch[i : i + size] for stretch in stretches for i in range(0, len(stretch), size)]
    rng.shuffle(batches)
    return batches


def load(arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    """Load the encoder under a head that is initialised from --seed."""
    torch.manual_seed(arguments.seed)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and arguments.dropout is not None:
            module.p = arguments.dropout
    return model


def save(model: Any, arguments: argparse.Namespace) -> None:
    """Save the model with its tokenizer, read afresh: one that has padded a batch would save its length as well."""
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, run, batch_size, max_length in (
        ("classifier", classifier, 32, 128),
        ("cross-encoder", cross_encoder, 4, 256),
    ):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--model", required=True, help="hub id or directory of an encoder")
        command.add_argument("--train", type=Path, required=True, help="JSON lines to train on")
        command.add_argument("--output", type=Path, required=True, help="where the model directory is written")
        command.add_argument("--epochs", type=int, default=1)
        command.add_argument("--batch-size", type=int, default=batch_size, help="rows per step")
        command.add_argument("--max-length", type=int, default=max_length, help="positions; the rest is cut off")
        command.add_argument("--learning-rate", type=float, default=5e-5)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--dropout", type=float, help="instead of the model's own; 0 saves half of a CPU's time")
        command.add_argument("--bf16", action="store_true", help="bfloat16 arithmetic: faster where the CPU has it")
    commands.choices["classifier"].add_argument("--eval", type=Path, help="JSON lines to evaluate on")
    commands.choices["classifier"].add_argument("--regression", action="store_true", help="labels are numbers")
    commands.choices["cross-encoder"].add_argument("--documents", type=int, default=8, help="documents per query")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    options.run(options)
