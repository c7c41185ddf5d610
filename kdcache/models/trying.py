"""Run a model for a moment in another mode, and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


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
