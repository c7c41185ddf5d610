"""The identity of a model's weights by content."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


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
