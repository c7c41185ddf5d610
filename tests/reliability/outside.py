"""A directory tree around a cache and a command's output, in which nothing may change but these two."""

from __future__ import annotations

import os
from pathlib import Path

#: The cache lies three levels deep, so that ``../../../up`` still ends inside the tree.
_DEPTH = ("one", "two", "three")


class Surroundings:
    """``<root>/one/two/three`` with a file to spoil on every level; caches and outputs lie in the innermost one.

    `enter` makes the current directory, the home and the directory of temporary files parts of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inner = root.joinpath(*_DEPTH)
        self.inner.mkdir(parents=True)
        for level in (root, *(root.joinpath(*_DEPTH[:n]) for n in range(1, 4))):
            for name in ("up", "victim/keep.txt", "manifest.json", "fields/targets/000000-keep.zarr.zip"):
                (level / name).parent.mkdir(parents=True, exist_ok=True)
                (level / name).write_text(f"a file of somebody else: {name}")
        for name in ("home", "here"):
            (root / name).mkdir()
        self.temporary = root.with_name(root.name + "-temporary")
        self.temporary.mkdir()
        self.allowed: list[Path] = []
        """What may change: the cache and the outputs."""
        self._before = self._state()

    def enter(self) -> None:
        """Make this process work inside the tree, where it writes without being told where."""
        os.chdir(self.root / "here")
        os.environ["HOME"] = str(self.root / "home")
        os.environ["TMPDIR"] = str(self.temporary)

    def changes(self) -> list[str]:
        """Return the paths outside ``allowed`` that were made, changed or removed since the last call."""
        before, self._before = self._before, self._state()
        paths = before.keys() | self._before.keys()
        return sorted(path for path in paths if before.get(path) != self._before.get(path))

    def _state(self) -> dict[str, object]:
        """Everything below the root but what may change: for files what a change of them changes too."""
        found: dict[str, object] = {}
        allowed = {str(path) for path in self.allowed}
        waiting = [str(self.root)]
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.path in allowed:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        found[entry.path] = "directory"
                        waiting.append(entry.path)
                    else:
                        status = entry.stat(follow_symlinks=False)
                        found[entry.path] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found
