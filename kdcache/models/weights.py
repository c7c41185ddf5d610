"""The identity of a model's weights by content.

Hashing a large model takes minutes. A dry run that only compares plans may use the hash of an earlier load of the same
files (`remembered_sha256`); whatever is written into a cache is hashed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.models.hub import directory_of
from kdcache.storage.local_store import LocalStoreConfig

#: File in the directory of the local store that maps keys of loaded files to hashes, the newest last.
_REMEMBERED = "weights.json"
_MOST_REMEMBERED = 500
#: What decides the weights in a model's directory; the modules of a sentence model are folders in it.
_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".pt", ".model")


def weights_sha256(model: Any) -> str:
    """Return a SHA-256 over name, dtype, shape and bytes of every parameter and persistent buffer, in name order.

    A name alone is not an identity (checkpoints are replaced under their names), nor is a file's hash (the same
    weights come as safetensors, shards of it or GGUF). Tensors are hashed in parallel: hashing releases the GIL.
    """
    state = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(lambda item: _entry(*item), state))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _entry(name: str, tensor: Tensor) -> list[Any]:
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return [name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(data.data).hexdigest()]


def remembered_sha256(model: Any, name: str, revision: str | None = None) -> str:
    """Return `weights_sha256` of a model that was loaded from ``name`` at ``revision``, hashing it only the first time.

    The hash is kept under path, size and modification time of the files, the class and the dtype of the model. A file
    that is replaced by one of the same size and time goes unnoticed, so this is for dry runs alone.
    """
    key = _key(model, name, revision)
    if key is None:
        return weights_sha256(model)
    path = LocalStoreConfig().path / _REMEMBERED
    known = _read(path)
    if key not in known:
        digest = weights_sha256(model)
        known = {**_read(path), key: digest}
        with contextlib.suppress(OSError):  # a directory that cannot be written to only costs time
            _write(path, dict(list(known.items())[-_MOST_REMEMBERED:]))
    return known[key]


def _key(model: Any, name: str, revision: str | None) -> str | None:
    source = Path(name) if os.path.exists(name) else directory_of(name, revision)
    if source is None:
        return None
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix in _SUFFIXES)
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()]
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    facts = [type(model).__qualname__, dtypes, stats, torch.__version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _write(path: Path, known: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(known, file)
    os.replace(file.name, path)
