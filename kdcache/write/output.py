"""An append-only file of JSON lines that an interrupted run resumes.

The settings of the run stand next to it in ``NAME.settings.json``, written before the first line. A run that resumes
the file must have the same settings; otherwise the error says what differs. A line is complete when its line break is
written; an incomplete last line is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from kdcache.errors import ConfigError
from kdcache.storage.folder import Folder

_CHUNK_BYTES = 1 << 20


class TargetsFile:
    """The one process that may write to ``path``; use it as a context manager, it holds a lock."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self._settings = path, settings
        self._lock = FileLock(lock_path(path))
        self.num_lines = 0

    def __enter__(self) -> TargetsFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another process is writing to {self.path}; wait for it, or choose another output"
            ) from None
        try:
            self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release()

    def _begin(self) -> None:
        check_output(self.path, self._settings)
        self.num_lines, num_bytes = complete_lines(self.path)
        if self.num_lines == 0:
            text = json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n"
            Folder(str(self.path.parent)).write(settings_path(self.path).name, text.encode())
        with self.path.open("ab") as file:
            file.truncate(num_bytes)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write one line for each of ``rows``, and wait until they are on the disk."""
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
        with self.path.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def _release(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def settings_path(path: Path) -> Path:
    """Return the path of the settings of a file."""
    return path.with_name(f"{path.name}.settings.json")


def lock_path(path: Path) -> Path:
    """Return the path of the lock of a file."""
    return path.with_name(f"{path.name}.lock")


def check_output(path: Path, settings: dict[str, Any]) -> None:
    """Raise ``ConfigError`` unless ``path`` is empty or the beginning of the output of ``settings``."""
    if path.is_dir():
        raise ConfigError(f"output {path} is a directory; give a file, such as {path / 'targets.jsonl'}")
    if complete_lines(path)[0] == 0 and (not path.exists() or settings_path(path).exists()):
        return
    if not settings_path(path).exists():
        raise ConfigError(
            f"output {path} exists, and without {settings_path(path).name} it is not known what wrote it; choose "
            "another output"
        )
    try:
        found = json.loads(settings_path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{settings_path(path)} is not valid JSON ({error}); choose another output") from None
    different = _differences(_compared(found), _compared(settings))
    if different:
        raise ConfigError(
            f"output {path} was begun with other settings: {'; '.join(different[:4])}"
            f"{' ...' if len(different) > 4 else ''}. Repeat the command that began it, or choose another output"
        )


def complete_lines(path: Path) -> tuple[int, int]:
    """Return the number of complete lines of a file and their bytes; 0 and 0 if it does not exist."""
    num_lines = num_bytes = done = 0
    if not path.exists():
        return 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            num_lines += chunk.count(b"\n")
            if b"\n" in chunk:
                num_bytes = done + chunk.rindex(b"\n") + 1
            done += len(chunk)
    return num_lines, num_bytes


def _compared(settings: Any) -> dict[str, Any]:
    """Return the settings that decide the texts, flat: names and paths may change while the content stays."""
    flat = _flat(settings if isinstance(settings, dict) else {})
    unimportant = ("teacher.name", "teacher.revision", "corpus.sources")
    return {name: value for name, value in flat.items() if name not in unimportant}


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*before, *after])
    return [
        f"{name} is {before.get(name)!r} there and {after.get(name)!r} here"
        for name in names
        if before.get(name) != after.get(name)
    ]
