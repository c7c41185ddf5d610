"""Prepare abstracts of papers with their titles and one-sentence summaries: SciTLDR.

    python pipelines/seq2seq_lm/prepare.py OUTPUT_DIR --data FOLDER

``FOLDER`` holds train.jsonl, dev.jsonl and test.jsonl of SciTLDR-A (``source``: the sentences of the abstract;
``target``: summaries; ``title``). Written are the three as rows of ``abstract``, ``title``, ``summary`` (the first of
the given ones) and ``paper_id``. Papers without a title are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def row(paper: dict[str, Any]) -> dict[str, str]:
    """Return the row of a paper, its white space made plain."""
    texts = {"abstract": " ".join(paper["source"]), "title": paper.get("title") or "", "summary": paper["target"][0]}
    return {"paper_id": paper["paper_id"], **{name: " ".join(text.split()) for name, text in texts.items()}}


def main() -> None:
    """Write the three splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where train.jsonl, dev.jsonl and test.jsonl are written")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl, dev.jsonl and test.jsonl")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        papers = [json.loads(line) for line in (arguments.data / f"{split}.jsonl").read_text("utf-8").splitlines()]
        rows = [found for found in map(row, papers) if found["title"]]
        (arguments.output / f"{split}.jsonl").write_text("".join(json.dumps(found) + "\n" for found in rows), "utf-8")
        print(f"{arguments.output / split}.jsonl: {len(rows)} papers", file=sys.stderr)


if __name__ == "__main__":
    main()
