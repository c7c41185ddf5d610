"""Private directories with files of a cache, for libraries that read directories.

Loaders of tokenizers look for many files, and read whatever lies in the directory that they are given. They are given
one that holds what the manifest records, checked, and nothing else.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kdcache.cache import layout

#: Directories by process and content: caches with the same tokenizer share one.
_directories: dict[tuple[int, frozenset[tuple[str, str]]], Path] = {}


def private_copy(files: Mapping[str, bytes], prefix: str) -> Path:
    """Return a directory that holds ``files``, by name, and nothing else; it is removed when the process ends."""
    key = os.getpid(), frozenset((name, layout.sha256(data)) for name, data in files.items())
    directory = _directories.get(key)
    if directory is None or not directory.is_dir():
        directory = _directories[key] = _new_directory(prefix)
        for name, data in files.items():
            (directory / name).write_bytes(data)
    return directory


def _new_directory(prefix: str) -> Path:
    from multiprocessing.util import Finalize

    directory = Path(tempfile.mkdtemp(prefix=prefix))
    # Unlike atexit, it also runs in processes that multiprocessing starts, and never in a fork of this one.
    Finalize(None, shutil.rmtree, args=(directory, True), exitpriority=0)
    return directory
