"""A bounded store of downloaded objects, which every process of a machine and every cache may share.

::

    <directory>/
      objects/ab/<sha256>               whole, checked objects, under the hash of their content
      partial/<sha256>.<num_bytes>      downloads in progress; never read
      lock                              held briefly by a process that changes the content of the store

Processes coordinate through locks of the operating system (flock), which end with the process that holds them. So no
counter can go wrong, and nothing needs repair after a crash. A reader holds a *shared* lock on an object that it reads
or has prefetched; only an object that can be locked *exclusively* is evicted. A download holds an exclusive lock on its
partial file: other readers of the same object wait for it, and an unlocked partial file was left by a killed process.
The name of the partial file reserves the full size before the download starts, so the bound holds at every moment. The
least recently used object is evicted first (its modification time is the time of its last use).

Every file that the manifest records with a hash goes through the store: objects of shards, the tokenizer, an LM head.
Caches on a local path do not use it. If other processes hold so much that an object does not fit, it is read without
being stored, which is slow, but no process blocks another. Do not put the store on a network file system where flock
does not hold between its clients.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from kdcache.config import Config
from kdcache.errors import CacheError, shortened
from kdcache.schema import ObjectRecord
from kdcache.storage.download import download, file_sha256
from kdcache.storage.folder import Folder

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(value: Any) -> Any:
    """Convert a size such as ``"20GB"``, ``"1.5 TB"`` or ``"512MiB"`` to bytes; return numbers unchanged.

    Raises ``ValueError`` for any other text.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower())
    if found is None or (found[3] and not found[2]):
        raise ValueError("a size is a number with a unit (B, kB, MB, GB, TB, or KiB, MiB, GiB, TiB), such as 20GB")
    return int(float(found[1]) * (_BINARY if found[3] else _UNITS)[found[2]])


class LocalStoreConfig(Config):
    """Where this machine stores copies of remote caches, and how much of them."""

    directory: str | None = None
    """Default: ``$KDCACHE_STORE``, else ``~/.cache/kdcache``."""
    max_bytes: Annotated[int, BeforeValidator(parse_bytes)] = Field(default=50 * 10**9, ge=1)
    """Bytes, or a size such as ``20GB``. The free space of the disk is a bound as well."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that read through the store at the same time; each prefetches into its share of it."""

    @property
    def path(self) -> Path:
        """The directory of the store."""
        return Path(self.directory or os.environ.get("KDCACHE_STORE") or "~/.cache/kdcache").expanduser()


#: Names of the files of a store.
_OBJECT = re.compile("[0-9a-f]{64}")
_PARTIAL = re.compile(r"[0-9a-f]{64}\.\d{1,16}")


class _Stored(NamedTuple):
    last_use_s: float
    num_bytes: int
    path: Path


class LocalStore:
    """The store in ``config.directory``. Safe to use from any number of threads and processes."""

    def __init__(self, config: LocalStoreConfig) -> None:
        if fcntl is None:
            raise CacheError("the local store needs flock, which this system lacks; copy the cache with kdcache pull")
        self.directory, self.max_bytes = config.path, config.max_bytes
        self.share_bytes = config.max_bytes // config.num_processes
        self.give_way: Callable[[], None] = lambda: None
        """Called when an object that is needed now does not fit; releases what this process has prefetched."""
        self._has_warned = False
        self._objects, self._partial = self.directory / "objects", self.directory / "partial"
        try:
            for directory in (self._objects, self._partial):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"cannot make the local store in {self.directory}: {error.strerror}; remote caches are read through "
                "it, set another directory with local_store.directory or KDCACHE_STORE"
            ) from None

    def read(self, folder: Folder, record: ObjectRecord, where: str) -> bytes:
        """Return the bytes of an object, downloading it into the store if it is not there.

        ``where`` names the object in errors. Raises ``CorruptCacheError`` for an object that is missing or damaged at
        its source, ``CacheError`` when it cannot be downloaded, or is larger than the store or the free disk space.
        """
        held = self.hold(folder, record, where)
        if held is None:
            self.give_way()
            held = self.hold(folder, record, where)
        if held is None:
            return self._read_past(folder, record, where)
        with held:
            return held.read()

    def hold(
        self, folder: Folder, record: ObjectRecord, where: str, cancelled: Callable[[], bool] = lambda: False
    ) -> IO[bytes] | None:
        """Return an object as an open file, which protects it from eviction; None when there is no room for it.

        Waits while another thread or process downloads the object. Raises what `read` raises, and
        ``DownloadCancelledError`` once ``cancelled`` returns True.
        """
        while True:
            held = self._held(record)
            if held is not None:
                return held
            with self._locked():
                if self._path(record).exists():  # since a moment ago
                    continue
                partial, is_mine = self._reserve(record)
            if partial is None:
                return None
            with partial:
                if is_mine:
                    self._fill(partial, folder, record, where, cancelled)
                else:
                    fcntl.flock(partial, fcntl.LOCK_SH)  # returns when the other download ends, however it does

    def drop_damaged(self, record: ObjectRecord) -> bool:
        """Remove a stored object if its content has changed since the download; return whether it had."""
        path = self._path(record)
        try:
            if file_sha256(path) == record.sha256:
                return False
        except FileNotFoundError:
            return False
        log.warning("%s has changed since it was downloaded, and is downloaded again", path)
        with self._locked():
            path.unlink(missing_ok=True)
        return True

    def _held(self, record: ObjectRecord) -> IO[bytes] | None:
        """Return an object that is in the store, locked and marked as used."""
        path = self._path(record)
        try:
            file = open(path, "rb")  # noqa: SIM115 - it is the lock that is returned
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if status.st_nlink and status.st_size == record.num_bytes:
            os.utime(file.fileno())
            return file
        file.close()
        if status.st_nlink:  # a damaged disk, or the file was edited
            with self._locked():
                path.unlink(missing_ok=True)
        return None

    def _reserve(self, record: ObjectRecord) -> tuple[IO[bytes] | None, bool]:
        """Return the partial file of an object, and whether this caller locked it and must fill it; None if full."""
        path = self._partial / f"{record.sha256}.{record.num_bytes}"
        used, unwritten = self._under_way()
        if path.exists():
            return open(path, "rb"), False
        if not self._make_room(record.num_bytes, used, unwritten):
            return None, False
        file = open(path, "w+b")  # noqa: SIM115 - it stays locked while it is filled
        fcntl.flock(file, fcntl.LOCK_EX)
        return file, True

    def _fill(
        self, file: IO[bytes], folder: Folder, record: ObjectRecord, where: str, cancelled: Callable[[], bool]
    ) -> None:
        """Download into a reserved partial file and move it to its final name."""
        partial, target = Path(file.name), self._path(record)
        try:
            download(folder, record, partial, where, cancelled)
            os.fsync(file.fileno())
            with self._locked():
                target.parent.mkdir(exist_ok=True)
                os.replace(partial, target)
        except BaseException:
            with self._locked():
                partial.unlink(missing_ok=True)
            raise

    def _under_way(self) -> tuple[int, int]:
        """Return the bytes that downloads have reserved, and how many are not written yet; remove abandoned files."""
        used = unwritten = 0
        for path in self._partial.iterdir():
            if not _is_ours(path, _PARTIAL):
                continue
            with open(path, "rb") as file:
                if _try_lock(file):
                    path.unlink()
                    continue
                num_bytes = int(path.name.rpartition(".")[2])
                used += num_bytes
                unwritten += max(num_bytes - os.fstat(file.fileno()).st_size, 0)
        return used, unwritten

    def _make_room(self, num_bytes: int, under_way: int, unwritten: int) -> bool:
        """Evict the least recently used objects until ``num_bytes`` more fit; return whether they do."""
        stored = self._stored()
        used = under_way + sum(item.num_bytes for item in stored)
        excess = max(used + num_bytes - self.max_bytes, num_bytes + unwritten - self._free_bytes())
        for item in sorted(stored):
            if excess <= 0:
                break
            if _evict(item.path):
                excess -= item.num_bytes
        return excess <= 0

    def _stored(self) -> list[_Stored]:
        found = []
        directories = [entry for entry in os.scandir(self._objects) if entry.is_dir(follow_symlinks=False)]
        for path in (Path(entry.path) for directory in directories for entry in os.scandir(directory)):
            if _is_ours(path, _OBJECT):
                status = path.stat()
                found.append(_Stored(status.st_mtime, status.st_size, path))
        return found

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.directory).free

    def _read_past(self, folder: Folder, record: ObjectRecord, where: str) -> bytes:
        """Return the bytes of an object that does not fit beside those of other processes, without storing it."""
        free = self._free_bytes()
        if record.num_bytes > self.max_bytes or record.num_bytes > free:
            raise CacheError(
                f"{where}: file {record.path} has {record.num_bytes:,} bytes, and the local store {self.directory} has "
                f"no room for it (at most {self.max_bytes:,} bytes, {free:,} free on its disk); raise "
                "local_store.max_bytes, free some of the disk, or give another directory with local_store.directory"
            )
        level, self._has_warned = logging.DEBUG if self._has_warned else logging.WARNING, True
        log.log(
            level,
            "other processes fill the local store %s (%.1f GB); %s is read without being stored. Raise "
            "local_store.max_bytes",
            self.directory,
            self.max_bytes / 1e9,
            record.path,
        )
        with tempfile.TemporaryDirectory(prefix="kdcache-") as directory:
            target = Path(directory, "object")
            download(folder, record, target, where)
            return target.read_bytes()

    def _path(self, record: ObjectRecord) -> Path:
        if _OBJECT.fullmatch(record.sha256) is None:  # it becomes a path, and may come from a stranger
            raise CacheError(
                f"file {record.path}: the manifest records the sha256 {shortened(record.sha256)!r}, which is not 64 "
                "hexadecimal digits; copy the cache again from a trusted source"
            )
        return self._objects / record.sha256[:2] / record.sha256

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.directory / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _is_ours(path: Path, name: re.Pattern[str]) -> bool:
    """Return whether the store can have written ``path``: what others put into its directories is left alone."""
    return name.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def _try_lock(file: IO[bytes]) -> bool:
    """Lock the file for the caller unless it is locked; return whether it worked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _evict(path: Path) -> bool:
    """Remove an object unless a reader holds it; return whether it is gone."""
    try:
        with open(path, "rb") as file:
            if not _try_lock(file):
                return False
            path.unlink()
    except FileNotFoundError:
        return True
    return True
