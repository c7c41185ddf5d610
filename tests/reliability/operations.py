"""Kill this process at its n-th operation on a file below a directory.

Operations are what Python does: opening for writing, syncing (then half of the file is lost, as in a power cut),
renaming, removing, making and removing directories; and the writers of tensors, which are not written in Python.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils

import kdcache.train.checkpoints

#: Functions of `os` whose first argument is what they change.
_CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "truncate", "link", "symlink")
#: (module, function, position of the path) of what writes tensors to a file.
_WRITERS = (
    (torch, "save", 1),
    (safetensors.torch, "save_file", 1),
    (transformers.modeling_utils, "safe_save_file", 1),
    (kdcache.train.checkpoints, "save_file", 1),
)


class Operations:
    """Counts the operations of this process below ``root`` and ends it at number ``kill_at`` (None: never).

    With ``half``, what was just written and not yet synced is cut to half before. Call `arm` in a process of its own:
    it replaces functions of `os` and does not put them back.
    """

    def __init__(self, root: Path, kill_at: int | None = None, *, half: bool = True) -> None:
        self.count = 0
        self._root, self._kill_at, self._half = str(root), kill_at, half
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Replace the functions that change files."""
        for name in _CHANGES:
            self._wrap(os, name)
        for module, name, position in _WRITERS:
            if hasattr(module, name):
                self._wrap(module, name, position, writes=True)
        real_open = builtins.open

        def opening(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            if isinstance(file, str | os.PathLike) and set(mode) & set("wax+"):
                self._hit(os.fspath(file))
            return real_open(file, mode, *arguments, **keywords)

        builtins.open = opening  # type: ignore[assignment]
        io.open = opening  # type: ignore[assignment]
        real_sync = os.fsync

        def sync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if os.path.isfile(path):
                self._hit(path, written=True)
            real_sync(number)

        os.fsync = sync

    def _wrap(self, module: Any, name: str, position: int = 0, *, writes: bool = False) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def function(*arguments: Any, **keywords: Any) -> Any:
            path = arguments[position] if len(arguments) > position else None
            if not isinstance(path, str | os.PathLike):
                return real(*arguments, **keywords)
            directory = keywords.get("dir_fd")
            whole = os.fspath(path)
            if isinstance(directory, int):
                whole = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), whole)
            self._hit(whole)
            result = real(*arguments, **keywords)
            if writes:
                self._hit(whole, written=True)
            return result

        setattr(module, name, function)

    def _hit(self, path: str, *, written: bool = False) -> None:
        if not os.path.abspath(path).startswith(self._root):
            return
        with self._lock:
            self.count += 1
            if self.count == self._kill_at:
                if written and self._half:
                    descriptor = os.open(path, os.O_WRONLY)
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
