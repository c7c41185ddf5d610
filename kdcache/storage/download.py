"""One object from a remote cache onto this machine's disk, checked against the manifest.

The object arrives in one request through the file system's own ``get_file``, which needs neither ranges nor listings of
the server and is what clients of object stores have made parallel and fast. What went wrong on the way (connections cut
or refused, bodies too short, bytes flipped, a server that is busy) is fetched again a few times, with pauses; what
stays wrong is named. Nothing here decides where the file lies or when it may be used: see `kdcache.storage.local_store`.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from kdcache.errors import CacheError, CorruptCacheError
from kdcache.schema import ObjectRecord
from kdcache.storage.folder import PAUSES_S, Folder

#: What another attempt cannot help: the local disk is full, or its quota is used up.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class DownloadCancelledError(CacheError):
    """Nobody wants the object any more."""


class _WrongBytesError(Exception):
    """What arrived is not what the manifest records."""


def download(
    folder: Folder, record: ObjectRecord, target: Path, where: str, cancelled: Callable[[], bool] = lambda: False
) -> None:
    """Fetch an object into the file ``target`` and check its size and sha256, with up to three attempts.

    ``where`` names cache, shard and field in errors: ``CorruptCacheError`` for an object that is missing or arrives
    damaged every time, ``CacheError`` for a server that cannot be reached and a full disk, ``DownloadCancelledError``
    once ``cancelled`` says so.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            _attempt(folder, record, target, cancelled)
            return
        except DownloadCancelledError:
            raise
        except Exception as error:
            refusal = _refusal(error, folder, record, where)
            if refusal is not None or pause_s is None:
                raise (refusal or _given_up(error, folder, record, where)) from None
            time.sleep(pause_s)


def _attempt(folder: Folder, record: ObjectRecord, target: Path, cancelled: Callable[[], bool]) -> None:
    folder.fetch(record.path, target, _Watch(record.num_bytes, cancelled))
    size = target.stat().st_size
    if size != record.num_bytes:
        raise _WrongBytesError(f"{size:,} bytes arrived of {record.num_bytes:,}")
    found = file_sha256(target)
    if found != record.sha256:
        raise _WrongBytesError(f"its sha256 is {found[:12]}..., the manifest says {record.sha256[:12]}...")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Watch(Callback):
    """Ends a transfer that brings more than it should, or that nobody waits for."""

    def __init__(self, num_bytes: int, cancelled: Callable[[], bool]) -> None:
        super().__init__()
        self._num_bytes, self._cancelled = num_bytes, cancelled

    def relative_update(self, inc: int = 1) -> None:
        """Count ``inc`` bytes that have arrived."""
        self.value += inc
        if self.value > self._num_bytes:
            raise _WrongBytesError(f"more than {self._num_bytes:,} bytes arrived")
        if self._cancelled():
            raise DownloadCancelledError("the download was cancelled")

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """Do nothing: there is no bar to draw."""


def _refusal(error: Exception, folder: Folder, record: ObjectRecord, where: str) -> CacheError | None:
    """Return the error for what another attempt cannot help, None for the rest."""
    if isinstance(error, FileNotFoundError):
        return CorruptCacheError(f"{where}: file {record.path} is missing from {folder}")
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return CacheError(
            f"{where}: the disk of the local store is full, {record.path} ({record.num_bytes:,} bytes) does not fit; "
            "free some of it, or give another directory with local_store.directory"
        )
    return None


def _given_up(error: Exception, folder: Folder, record: ObjectRecord, where: str) -> CacheError:
    tries = len(PAUSES_S) + 1
    url = f"{folder.url.rstrip('/')}/{record.path}"
    if isinstance(error, _WrongBytesError):
        return CorruptCacheError(
            f"{where}: file {url} arrived damaged {tries} times ({error}); kdcache verify tells whether it is damaged "
            "there, and the command that made the cache or kdcache push writes it again"
        )
    return CacheError(
        f"{where}: cannot download {url} in {tries} attempts: {str(error) or type(error).__name__}; when the server is "
        "back the same command goes on"
    )
