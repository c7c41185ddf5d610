"""Prepare texts with labels: SST-2 (sentiment, two classes) or STS-B (how alike two sentences are, 0 to 5).

    python pipelines/sequence_classification/prepare.py OUTPUT_DIR --data FOLDER --task sst2

``FOLDER`` holds train.tsv, dev.tsv and test.tsv (label TAB sentence, 0 negative and 1 positive), or for ``stsb`` the
three as .csv (sentence1, sentence2, score). Written are train.jsonl, dev.jsonl and test.jsonl: ``text``, ``label`` and,
for pairs, ``text_pair``. Labels are written as names, so that no model can mix up its classes.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SENTIMENTS = {"0": "negative", "1": "positive"}


def sst2(path: Path) -> Iterator[dict[str, Any]]:
    """Yield one row per sentence, its label ``negative`` or ``positive``."""
    for line in path.read_text(encoding="utf-8").splitlines():
        label, text = line.split("\t")
        yield {"text": text, "label": SENTIMENTS[label]}


def stsb(path: Path) -> Iterator[dict[str, Any]]:
    """Yield one row per pair of sentences, its label the mean of the annotators' scores, 0 to 5."""
    with path.open(encoding="utf-8", newline="") as file:
        for text, text_pair, score in csv.reader(file):
            yield {"text": text, "text_pair": text_pair, "label": float(score)}


TASKS = {"sst2": (sst2, ".tsv"), "stsb": (stsb, ".csv")}


def main() -> None:
    """Write the three splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where train.jsonl, dev.jsonl and test.jsonl are written")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, dev and test as .tsv or .csv")
    parser.add_argument("--task", choices=TASKS, default="sst2")
    arguments = parser.parse_args()
    read, suffix = TASKS[arguments.task]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        lines = [json.dumps(row) + "\n" for row in read(arguments.data / f"{split}{suffix}")]
        (arguments.output / f"{split}.jsonl").write_text("".join(lines))
        print(f"{arguments.output / split}.jsonl: {len(lines)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
