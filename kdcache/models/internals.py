"""Names of torch and transformers that these do not publish, each behind one function.

Such a name may change in any release of its library, without notice. So it stands here and nowhere else, each function
says what it relies on and in which versions that was seen, and `tests/test_private_names.py` has a canary for each: a
small test that fails where the name is gone or behaves in another way, and says which function is concerned.

What cannot be a function: `kdcache.train.trainer` overrides five private methods of the Trainer; it has canaries, too.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "TorchDispatchMode",
    "attention_of",
    "identity_of_storage",
    "leaves_of",
    "model_from_config",
    "onednn_linear",
    "use_one_gpu",
]

# `TorchDispatchMode` is a context in which a method, ``__torch_dispatch__(self, func, types, args, kwargs)``, sees
# every operation on tensors. It is documented, but only under the private name of its module. Seen in torch 2.6
# to 2.13.


def leaves_of(tree: Any) -> list[Any]:
    """Return everything in nested lists, tuples and dictionaries that is none of these.

    Relies on ``torch.utils._pytree.tree_leaves``. Seen in torch 2.6 to 2.13.
    """
    return tree_leaves(tree)


def identity_of_storage(storage: torch.UntypedStorage) -> Hashable:
    """Return a value that two storage objects share while, and only while, they are the same memory.

    Relies on ``torch.UntypedStorage._cdata``, the address of the storage itself, which storages of the meta device have
    too (their data has none). Seen in torch 2.6 to 2.13.
    """
    address: int = storage._cdata
    return address


def onednn_linear() -> Any | None:
    """Return torch's linear layer in oneDNN, None where this build has none.

    It is called with (input, weight, bias, "none", [], ""). Relies on ``torch.ops.mkldnn._linear_pointwise``, which
    compiled models use. Seen in torch 2.6 to 2.13.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def model_from_config(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model of this class with new weights in ``dtype``; what its class keeps in float32 stays so.

    Relies on ``PreTrainedModel._from_config(config, dtype=...)``, of which the published ``AutoModel.from_config``
    makes use, for the classes that it chooses. Seen in transformers 5.0 to 5.23.
    """
    return model_class._from_config(config, dtype=dtype)


def attention_of(config: Any) -> Any:
    """Return the implementation of attention that a configuration asks for, such as ``sdpa``; None where it says none.

    Relies on ``PreTrainedConfig._attn_implementation``. Seen in transformers 5.0 to 5.23.
    """
    return getattr(config, "_attn_implementation", None)


def use_one_gpu(arguments: Any) -> None:
    """Make ``TrainingArguments`` use one GPU of several; those of other processes are theirs.

    Relies on ``TrainingArguments._n_gpu``, which the published ``n_gpu`` returns. Seen in transformers 5.0 to 5.23.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)
