"""Download one object of a remote cache to this machine's disk and check it against its record.

The object arrives in one request through the file system's own ``get_file``, which needs neither ranges nor listings
of the server. Bytes that arrive short or damaged count as a failed attempt of the retry policy
(`kdcache.storage.retry`). Where the file lies and when it may be used is decided in `kdcache.storage.local_store`.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from kdcache.errors import CacheError, CorruptCacheError
from kdcache.schema import ObjectRecord
from kdcache.storage.failures import explained
from kdcache.storage.folder import Folder
from kdcache.storage.retry import RetriesExhaustedError, WrongBytesError, words_of

#: Errors of a local disk that is full, or whose quota is used up.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class DownloadCancelledError(CacheError):
    """The object is not wanted any more."""


def download(
    folder: Folder, record: ObjectRecord, target: Path, where: str, cancelled: Callable[[], bool] = lambda: False
) -> None:
    """Fetch an object into the file ``target`` and check its size and SHA-256.

    ``where`` names cache, shard and field in errors. Raises ``CorruptCacheError`` for an object that is missing or
    arrives damaged at every attempt, ``CacheError`` for an unreachable server and a full disk, and
    ``DownloadCancelledError`` once ``cancelled`` returns True.
    """
    try:
        folder.fetch(record.path, target, partial(_Watch, record.num_bytes, cancelled), partial(_check, target, record))
    except CacheError:
        raise
    except FileNotFoundError:
        raise CorruptCacheError(f"{where}: file {record.path} is missing from {folder}") from None
    except Exception as error:
        raise _failure(error, folder, record, where) from None


def _check(target: Path, record: ObjectRecord) -> None:
    size = target.stat().st_size
    if size != record.num_bytes:
        raise WrongBytesError(f"{size:,} bytes arrived of {record.num_bytes:,}")
    found = file_sha256(target)
    if found != record.sha256:
        raise WrongBytesError(f"its sha256 is {found[:12]}..., the manifest says {record.sha256[:12]}...")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Watch(Callback):
    """Ends a transfer that brings more bytes than recorded, or that is cancelled."""

    def __init__(self, num_bytes: int, cancelled: Callable[[], bool]) -> None:
        super().__init__()
        self._num_bytes, self._cancelled = num_bytes, cancelled

    def relative_update(self, inc: int = 1) -> None:
        """Count ``inc`` bytes that have arrived."""
        self.value += inc
        if self.value > self._num_bytes:
            raise WrongBytesError(f"more than {self._num_bytes:,} bytes arrived")
        if self._cancelled():
            raise DownloadCancelledError("the download was cancelled")

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """Do nothing: there is no progress bar."""


def _failure(error: Exception, folder: Folder, record: ObjectRecord, where: str) -> CacheError:
    """Return the error that tells the user what failed and what to do."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return CacheError(
            f"{where}: the disk of the local store is full, {record.path} ({record.num_bytes:,} bytes) does not fit; "
            "free some of it, or give another directory with local_store.directory"
        )
    url = f"{folder.url.rstrip('/')}/{record.path}"
    attempts, last = 1, error
    if isinstance(error, RetriesExhaustedError):
        attempts, last = error.attempts, error.last
    if isinstance(last, WrongBytesError):
        return CorruptCacheError(
            f"{where}: file {url} arrived damaged {attempts} times ({last}); check the file there with kdcache verify, "
            "and write it again with the command that made the cache or with kdcache push"
        )
    if attempts == 1:
        return CacheError(f"{where}: cannot download {url}: {explained(error)}")
    return CacheError(
        f"{where}: cannot download {url} in {attempts} attempts: {words_of(last)}; run the same command again when the "
        "server is back"
    )
