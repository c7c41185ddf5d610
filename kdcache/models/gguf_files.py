"""GGUF files are parsed once: their header has the whole vocabulary, and transformers parses it for each load.

Tokenizer, configuration and weights would be four passes over a header in pure Python, each about ten seconds for the
262,144 tokens of a Gemma. While something is loaded (`parsed_once`), the reader of the last file is handed out again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

#: Key and reader of the file that was parsed last.
_LAST: list[tuple[Any, Any]] = []


@contextlib.contextmanager
def parsed_once(name: str) -> Iterator[None]:
    """Let transformers load from ``name`` without parsing a GGUF file that was parsed already; other names pass."""
    if not name.endswith(".gguf"):
        yield
        return
    try:
        import gguf
    except ImportError:
        yield  # said when the file is loaded
        return
    own = gguf.GGUFReader

    def reader_of(path: Any, *more: Any) -> Any:
        stat = os.stat(path)
        key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, more)
        if not _LAST or _LAST[0][0] != key:
            _LAST[:] = [(key, own(path, *more))]
        return _LAST[0][1]

    gguf.GGUFReader = reader_of
    try:
        yield
    finally:
        gguf.GGUFReader = own


def forget() -> None:
    """Give up the reader of the last file, which takes some hundred MB for a large vocabulary."""
    _LAST.clear()
