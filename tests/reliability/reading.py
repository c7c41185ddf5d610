"""Everything that can be read from a cache, as hashes: equal ones mean that every use of it gets the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache import layout, open_cache


def read_everything(path: Path) -> dict[str, str]:
    """Return the hash of every value that ``path`` gives, by name; raises what reading raises."""
    with open_cache(str(path)) as cache:
        manifest = cache.manifest
        batch = cache.read(range(len(cache)), fields=manifest.vector_fields)
        found: dict[str, Any] = {f"batch {name}": value for name, value in _values(batch)}
        found["tail prior"] = cache.tail_prior_V
        found["lengths"], found["sizes"] = cache.lengths_N, cache.sizes_N
        found["sequence table"] = cache.sequence_table().to_pydict()
        found["plan table"] = cache.plan_table().to_pydict()
        found["order"] = cache.order_key
        if manifest.targets.kind == "hidden":
            found["LM head"] = cache.lm_head_file()
        # As a tokenizer is loaded: from a directory.
        directory = cache.tokenizer_dir()
        recorded = [Path(record.path).name for record in manifest.tokenizer_files]
        found["tokenizer"] = {name: (directory / name).read_bytes().hex() for name in recorded}
        found["manifest"] = layout.to_json(manifest)
    return {name: _hash(value) for name, value in found.items()}


def _values(batch: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The members of a data class, with those of data classes and mappings in it."""
    found = []
    for member in (member for member in fields(batch) if member.compare):
        value = getattr(batch, member.name)
        if is_dataclass(value):
            found += _values(value, f"{prefix}{member.name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                name = f"{prefix}{member.name}.{key}"
                found += _values(item, f"{name}.") if is_dataclass(item) else [(name, item)]
        else:
            found.append((prefix + member.name, value))
    return found


def _hash(value: Any) -> str:
    if isinstance(value, np.ndarray):
        data = f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    elif isinstance(value, bytes):
        data = value
    else:
        data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()
