"""A folder at any fsspec URL, with the few operations that a cache needs.

Objects are written whole and become visible whole: on a local disk through a temporary name, fsync and rename; on an
object store by a single PUT, which is atomic. Only `names` lists directories; only clean-up and error messages use it.
Clients of object stores remember listings; a `Folder` forgets them before every question, because other processes
write to the same folder.

On remote stores every operation is retried by the one policy in `kdcache.storage.retry`; on a local path none is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem, make_path_posix

from kdcache.errors import CacheError, ConfigError, CorruptCacheError, KdcacheError
from kdcache.schema import ObjectRecord
from kdcache.storage.failures import explained, is_denied, is_missing_bucket
from kdcache.storage.retry import RetriesExhaustedError, WrongBytesError, retrying, words_of

T = TypeVar("T")

#: Suffix of files that are still being written; never read, removed by the next writer.
TEMPORARY = ".tmp"

#: Most bytes of a JSON record; a manifest has 1 to 2 kB for each shard. Parsed, records take up to 30 times as much.
MAX_RECORD_BYTES = 256 << 20

#: Characters that lead elsewhere on some system, or that no name of a cache has.
_UNSAFE = re.compile(r"[\\:\x00-\x1f\x7f]")


class ObjectStore(Protocol):
    """A store of checked copies on this machine; `kdcache.storage.local_store.LocalStore` is one."""

    def read(self, folder: Folder, record: ObjectRecord, where: str) -> bytes:
        """Return the bytes of an object of ``folder``; ``where`` names it in errors."""
        ...

    def drop_damaged(self, record: ObjectRecord) -> bool:
        """Remove the copy of an object if it is damaged; return whether it was."""
        ...


class Folder:
    """A folder at ``url`` (a local path or any fsspec URL)."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self.store: ObjectStore | None = None
        """Local copies of the objects of a remote cache; set by the code that reads objects repeatedly."""
        self.checked: set[str] = set()
        """Objects whose hash was compared since this folder was opened: later readings rely on their checksums."""
        try:
            if "://" in self.url:
                self._fs, root = fsspec.core.url_to_fs(self.url, **_client_options(self.url))
            else:  # fsspec takes a path with "::" for a chain of stores, and would write to another one
                self._fs = fsspec.filesystem("file")
                root = make_path_posix(self.url)
        except (ImportError, ValueError) as error:
            raise CacheError(f"cannot open {self.url}: {error}") from None
        self.root = str(root).rstrip("/")
        self._is_web = self.url.startswith(("http://", "https://"))

    @property
    def local_path(self) -> Path | None:
        """The folder on this machine's disk, None when it is elsewhere."""
        return Path(self.root) if isinstance(self._fs, LocalFileSystem) else None

    @property
    def store_kind(self) -> type:
        """The kind of store. The same root in two kinds of stores names two different folders."""
        return type(self._fs)

    def read(self, name: str, sha256: str | None = None, *, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
        """Return the bytes of object ``name``; with ``sha256`` (hexadecimal), only bytes that have it.

        ``max_bytes`` is the size that a record says (default: more than a JSON record has); no more is read. Raises
        ``FileNotFoundError``, ``CacheError`` when a remote store cannot be reached, and ``CorruptCacheError`` when the
        object is larger, is no regular file, or its bytes have another hash at every attempt.
        """

        if self.local_path is not None:
            get = self._read_local
        elif self._is_web:
            get = self._read_web
        else:  # the size is a question of its own, so that each is retried by itself
            self._check_size(name, max_bytes)
            get = self._read_remote

        def attempt() -> bytes:
            data = get(name, max_bytes)
            if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
                raise WrongBytesError
            return data

        return self._attempt(attempt, name)

    def local_file(self, name: str) -> Path:
        """Return the path of object ``name`` of a folder on this machine's disk.

        Raises ``FileNotFoundError``, and ``CorruptCacheError`` where it is no regular file: a folder from a stranger
        may hold a pipe, which would wait for ever, or a link to a device without an end.
        """
        path = self._path(name)
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if not _is_missing(error):
                raise self._cannot_read(name, error) from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        if not stat.S_ISREG(mode):
            what = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise CorruptCacheError(f"file {name} of {self.url} is {what}; move it away, and copy the file again")
        return Path(path)

    def _read_local(self, name: str, max_bytes: int) -> bytes:
        path = self.local_file(name)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    raise self._too_large(name, size, max_bytes)
                return file.read(size)
        except OSError as error:
            if _is_missing(error):  # removed a moment ago
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
            raise self._cannot_read(name, error) from None

    def _cannot_read(self, name: str, error: OSError) -> CacheError:
        return CacheError(
            f"cannot read {self._url_of(name)}: {error.strerror or error}; check the disk and who may read there"
        )

    def _check_size(self, name: str, max_bytes: int) -> None:
        info = self._info(name)
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._path(name))
        size = info.get("size")
        if size is not None and size > max_bytes:
            raise self._too_large(name, size, max_bytes)

    def _read_remote(self, name: str, max_bytes: int) -> bytes:
        data = bytes(self._fs.cat_file(self._path(name)))
        if len(data) > max_bytes:
            raise self._too_large(name, len(data), max_bytes)
        return data

    def _read_web(self, name: str, max_bytes: int) -> bytes:
        """Read from a web server, which may say any size and send another, or end never."""
        buffer = io.BytesIO()
        bound = _Bound(max_bytes, lambda num_bytes: self._too_large(name, num_bytes, max_bytes))
        self._fs.get_file(self._path(name), buffer, callback=bound)
        return buffer.getvalue()

    def _too_large(self, name: str, num_bytes: int, max_bytes: int) -> CorruptCacheError:
        return CorruptCacheError(
            f"file {name} of {self.url} has {num_bytes:,} bytes, at most {max_bytes:,} are expected; it is damaged or "
            "not what a cache holds"
        )

    def fetch(
        self,
        name: str,
        target: Path,
        make_callback: Callable[[], Callback] = Callback,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy object ``name`` into the local file ``target``, in one request for each attempt.

        ``make_callback`` makes the progress callback of an attempt. ``check`` is called after the copy; what it raises
        counts as an error of the attempt, so damaged bytes are fetched again. Raises final errors as the file system
        raises them, and ``RetriesExhaustedError``.
        """

        def attempt() -> None:
            self._fs.get_file(self._path(name), str(target), callback=make_callback())
            check()

        retrying(attempt)

    def exists(self, name: str) -> bool:
        """Return whether object ``name`` exists."""
        # By its info: fsspec's own exists() takes any failure of the store for "no".
        return self._info(name) is not None

    def size(self, name: str) -> int | None:
        """Return the number of bytes of object ``name``, None when it is missing."""
        info = self._info(name)
        return None if info is None else int(info["size"])

    def names(self, directory: str = "") -> list[str]:
        """Return the sorted names, relative to the folder, of what lies directly in ``directory``.

        Empty when there is no such directory.
        """

        def listing() -> list[Any]:
            self._forget(directory)
            found: list[Any] = self._fs.ls(self._path(directory), detail=False)
            return found

        try:
            found = self._attempt(listing, directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            if self.local_path is None:
                raise
            if _is_missing(error):
                return []
            raise self._cannot_read(directory, error) from None
        names = (str(path).rstrip("/").removeprefix(self.root).lstrip("/") for path in found)
        # Some tools mark a directory of a store by an empty object of its name.
        return sorted(name for name in names if name not in ("", directory))

    def write(self, name: str, data: bytes) -> None:
        """Write object ``name`` so that readers see it whole or not at all, and so that it survives a power cut.

        Raises ``CacheError`` when it cannot be written (a full disk, no permission, a store that stays unreachable).
        """
        local = self.local_path
        try:
            if local is None:
                retrying(lambda: self._fs.pipe_file(self._path(name), data))
            else:
                _write_whole(self._writable_path(name), data)
        except KdcacheError:
            raise
        except Exception as error:  # each client has its own kinds
            raise self._cannot_write(name, data, error) from None

    def create(self, name: str, data: bytes) -> bool:
        """Write object ``name`` unless it exists; return whether this call wrote it.

        ``data`` must be unique to the caller (by a random token). The answer to a successful write may get lost, and
        the next attempt then finds an object; its content tells whose it is.

        If the store has conditional writes, exactly one of several concurrent callers succeeds; otherwise two may.
        Raises ``CacheError`` when the object cannot be written.
        """
        path = self._path(name) if self.local_path is None else str(self._writable_path(name))
        try:
            retrying(lambda: self._fs.pipe_file(path, data, mode="create"))
            return True
        except FileExistsError:
            pass
        except PermissionError as error:
            raise self._cannot_write(name, data, error) from None
        except Exception:  # each client says in its own way that its store has no conditional writes
            if not self.exists(name):
                self.write(name, data)
                return True
        try:
            return self.read(name) == data
        except FileNotFoundError:  # removed a moment ago
            return False

    def remove(self, name: str) -> None:
        """Remove object ``name`` if it exists; raises ``CacheError`` for a directory, and where it cannot be done."""
        if self.local_path is None:
            with contextlib.suppress(FileNotFoundError):
                path = self._path(name)
                self._attempt(lambda: self._fs.rm_file(path), name)
            return
        local = self._writable_path(name)
        if local.is_dir() and not local.is_symlink():
            raise CacheError(f"cannot remove {local}: it is a directory, and a file is expected there; move it away")
        try:
            local.unlink(missing_ok=True)
        except OSError as error:
            if not _is_missing(error):
                raise CacheError(f"cannot remove {local}: {error.strerror or error}; remove it yourself") from None

    def _info(self, name: str) -> dict[str, Any] | None:
        def ask() -> dict[str, Any]:
            self._forget(name)
            found: dict[str, Any] = self._fs.info(self._path(name))
            return found

        try:
            return self._attempt(ask, name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if self.local_path is None:
                raise
            if _is_missing(error):
                return None
            raise self._cannot_read(name, error) from None

    def _attempt(self, action: Callable[[], T], name: str = "") -> T:
        """Return what ``action`` returns, retried on a remote store; turn the errors of its client into readable ones.

        A missing file passes, and every ``OSError`` of the local disk; everything else becomes a ``CacheError``.
        """
        try:
            return action() if self.local_path is not None else retrying(action)
        except KdcacheError:
            raise
        except MemoryError:
            raise CacheError(
                f"{self._url_of(name)} does not fit into the memory that is left; close other programs, or use a "
                "larger machine. If the file should be small, it is not what a cache holds"
            ) from None
        except Exception as error:
            if isinstance(error, OSError) and (self.local_path is not None or _is_missing_object(error)):
                raise
            last = error.last if isinstance(error, RetriesExhaustedError) else error
            if isinstance(last, WrongBytesError):
                raise CorruptCacheError(
                    f"file {name} of {self.url} is damaged: its sha256 is not the recorded one"
                ) from None
            if is_denied(last) or is_missing_bucket(last):
                raise CacheError(f"cannot read {self._url_of(name)}: {explained(error)}") from None
            raise CacheError(f"cannot reach {self.url}: {explained(error)}") from None

    def _cannot_write(self, name: str, data: bytes, error: Exception) -> CacheError:
        if self.local_path is None:
            reason = explained(error)
        else:
            reason = (error.strerror if isinstance(error, OSError) else None) or words_of(error)
        return CacheError(
            f"cannot write {self._url_of(name)} ({len(data):,} bytes): {reason}; what was finished before stays, and "
            "the same command resumes from there"
        )

    def _url_of(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def _forget(self, name: str) -> None:
        self._fs.invalidate_cache(self._path(name))

    def _path(self, name: str) -> str:
        """Return the full path of ``name``; every access goes through here, so none leads outside the folder."""
        if not name:
            return self.root
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or _UNSAFE.search(name):
            raise CacheError(f"path {name!r} leads outside {self.url}; it comes from a damaged or hostile record")
        return f"{self.root}/{name}"

    def _writable_path(self, name: str) -> Path:
        """Return the local path of ``name`` to write or remove; a link inside the folder must not lead out of it."""
        path = Path(self._path(name))
        root, parent = os.path.realpath(self.root), os.path.realpath(path.parent)
        if parent != root and not parent.startswith(root.rstrip(os.sep) + os.sep):
            raise CacheError(
                f"{path.parent} is a link that leads outside {self.url}; nothing is written there. Replace the link "
                "by a directory"
            )
        return path

    def __str__(self) -> str:
        return self.url


class _Bound(Callback):
    """Ends a transfer that has, or brings, more bytes than ``max_bytes``, by the error that ``too_large`` makes."""

    def __init__(self, max_bytes: int, too_large: Callable[[int], Exception]) -> None:
        super().__init__()
        self._max_bytes, self._too_large = max_bytes, too_large

    def relative_update(self, inc: int = 1) -> None:
        """Count ``inc`` bytes that have arrived."""
        self.value += inc
        # The size that the server says is that of an error page too, so it counts once the first bytes are there.
        num_bytes = max(self.value, self.size or 0)
        if num_bytes > self._max_bytes:
            raise self._too_large(num_bytes)

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """Do nothing: there is no progress bar."""


#: Of the local disk: nothing has this path, or a loop of links.
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def _is_missing(error: OSError) -> bool:
    return error.errno in _MISSING


def _is_missing_object(error: OSError) -> bool:
    # fsspec's HTTP client reports any answer but 200 as a missing file.
    is_missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return is_missing and not is_missing_bucket(error) and not is_denied(error)


def check_no_overlap(source: Folder, target: Folder) -> None:
    """Raise ``ConfigError`` when ``target`` is ``source``, lies inside it, or holds it."""
    if source.store_kind != target.store_kind:  # a bucket of one store may have the name of a bucket of another
        return
    inner, outer = (
        Path(os.path.realpath(folder.root)) if folder.local_path is not None else Path(folder.root)
        for folder in (target, source)
    )
    if inner == outer:
        relation = "is the source itself"
    elif outer in inner.parents:
        relation = f"lies inside the source {source}"
    elif inner in outer.parents:
        relation = f"holds the source {source}"
    else:
        return
    raise ConfigError(f"output {target} {relation}; choose a directory outside it")


def _client_options(url: str) -> dict[str, Any]:
    """Return options for the client of a store, where its own defaults do not fit."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    # By default a download has to end within five minutes, however large; here only a silence may not be long.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)}}


def _write_whole(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _fsync_directory(target.parent)


def _fsync_directory(directory: Path) -> None:
    # A rename is durable only once its directory is; Windows has no such call and needs none.
    if os.name == "nt":
        return
    descriptor: Any = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
