"""Prepare chemical reactions as texts: SMILES strings of the patents' reactions, without the numbers of their atoms.

    python pipelines/masked_lm/prepare.py OUTPUT_DIR --train valid.csv --test test.csv

The files are CSV with a column of reactions (``rxn_smiles``, or --column) such as the many copies of USPTO-50k have.
Written are train.jsonl and test.jsonl: ``text``, and ``class`` where there is such a column. Reactions that both files
have are left out of the latter.

Data sets number the atoms (``[CH3:1]``), to say which is which before and after a reaction; language models of
reactions were trained without these numbers. An atom that has brackets only because of its number loses them too.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

NUMBER = re.compile(r":\d+\]")
# Neither charge nor orientation, and no hydrogen that would not be understood: [nH] says more than n.
BARE_ATOM = re.compile(r"\[(?:(Br|Cl|B|C|N|O|P|S|F|I|c)(?:H\d?)?|([bnops]))\]")


def plain(reaction: str) -> str:
    """Return a reaction without the numbers of its atoms, nor the brackets that only they need."""
    return BARE_ATOM.sub(lambda match: match[1] or match[2], NUMBER.sub("]", reaction))


def rows(path: Path, column: str) -> Iterator[dict[str, str]]:
    """Yield one text per reaction."""
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if column not in row:
                sys.exit(f"{path} has no column {column!r}; its columns are {', '.join(row)}; choose with --column")
            if row[column] is None:
                sys.exit(f"{path}: row {number} has no {column}")
            yield {"text": plain(row[column])} | ({"class": row["class"]} if "class" in row else {})


def write(path: Path, found: list[dict[str, str]]) -> None:
    """Write rows as JSON lines and say how many."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    print(f"{path}: {len(found)} reactions", file=sys.stderr)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where train.jsonl and test.jsonl are written")
    parser.add_argument("--train", type=Path, required=True, help="CSV of reactions to train on")
    parser.add_argument("--test", type=Path, required=True, help="CSV of other reactions")
    parser.add_argument("--column", default="rxn_smiles")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train, test = (list(rows(path, arguments.column)) for path in (arguments.train, arguments.test))
    known = {row["text"] for row in train}
    write(arguments.output / "train.jsonl", train)
    write(arguments.output / "test.jsonl", [row for row in test if row["text"] not in known])


if __name__ == "__main__":
    main()
