"""Run a model for a moment in another mode, and leave it as it was."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from kdcache.errors import KdcacheError, first_line


@contextlib.contextmanager
def in_mode(model: Any, *, training: bool) -> Iterator[None]:
    """Put ``model`` into training or eval mode, and restore the mode of every submodule afterwards."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def in_eval_mode(model: Any) -> contextlib.AbstractContextManager[None]:
    """Put ``model`` into eval mode (dropout off), and restore the mode of every submodule afterwards."""
    return in_mode(model, training=False)


def is_out_of_memory(failure: BaseException) -> bool:
    """Return whether an exception of a model says that memory is full."""
    import torch

    # Only CUDA has a type of its own for it; other devices and CUDA's libraries say it in words.
    found = re.search(r"out of memory|can't allocate memory|ALLOC_FAILED", str(failure))
    return isinstance(failure, MemoryError | torch.OutOfMemoryError) or found is not None


@contextlib.contextmanager
def failures_of(model: Any, name: str, task: str, error: type[KdcacheError]) -> Iterator[None]:
    """Raise ``error`` for whatever the code of an architecture raises; what says that memory is full passes.

    Architectures differ in more than can be listed (inputs, attributes, shapes), and a model that cannot be run as the
    task asks fails somewhere in the code of transformers.
    """
    try:
        yield
    except KdcacheError:
        raise
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        raise error(
            f"{name} ({type(model).__name__}) cannot be run for task {task}: {type(failure).__name__}: "
            f"{first_line(failure)}; use another architecture"
        ) from failure
