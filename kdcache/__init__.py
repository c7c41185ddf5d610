"""Offline knowledge distillation of language models.

::

    import kdcache

    kdcache.dump_teacher(kdcache.DumpConfig(
        output="cache", teacher={"model": "HuggingFaceTB/SmolLM2-135M"}, corpus={"paths": ["texts/"]}))
    kdcache.train_student(kdcache.TrainConfig(cache="cache", student={"size": "small"}, output="run"))
    print(kdcache.evaluate_students("held-out-cache", ["run"]).table())

    batch = kdcache.open_cache("cache").read([0, 1, 2])   # numpy: tokens, targets, masks

Every command has a function of the same name with an object, such as ``verify_cache`` for ``kdcache verify``. What
``--dry-run`` prints comes from a ``preview_`` function. All of them raise `KdcacheError`.

The public names stand once, in ``__init__.pyi``, where type checkers read them and this module finds where each one
is defined. Importing kdcache therefore imports nothing heavy: a name is imported when it is first used.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


@functools.cache
def _homes() -> dict[str, str]:
    """Return the module of every public name, from the imports of the stub."""
    import ast

    tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    if name.startswith("_") or name not in _homes():
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(_homes()[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})
