"""Where a model of the hub lies on this machine after it was loaded, and which of its commits that is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def directory_of(name: str, revision: str | None = None) -> Path | None:
    """Return the directory of the hub's cache that holds ``name`` at ``revision`` (a branch, tag or commit).

    None for a model on a local path, and for one that was never downloaded.
    """
    if os.path.exists(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # no name of a repository
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def commit_of(name: str, revision: str | None = None) -> str | None:
    """Return the commit of the hub that loading ``name`` at ``revision`` gave; None where `directory_of` is None."""
    directory = directory_of(name, revision)
    return None if directory is None else directory.name
