"""Try a model on a few tokens, to learn what it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Keep ``model`` in eval mode for a while, without dropout; restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
