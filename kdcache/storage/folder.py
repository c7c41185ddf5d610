"""A folder at any fsspec URL, with the few operations a cache needs.

Objects are written whole and become visible whole: on a local disk through a temporary name, fsync and rename; on an
object store a single PUT is already atomic. Nothing here lists directories except `names`, which only clean-up and
error messages use. Clients of object stores remember listings; here every question is asked anew, because other
processes write to the same place.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from kdcache.errors import CacheError

if TYPE_CHECKING:
    from kdcache.storage.local_store import LocalStore

#: Suffix of files that are still being written; never read, removed by the next writer.
TEMPORARY = ".tmp"
#: Seconds before the second and the third attempt to get something from a remote store.
PAUSES_S = (0.5, 2.0)
#: Answers that another attempt does not change.
_FINAL = (FileNotFoundError, NotADirectoryError, PermissionError)


class Folder:
    """A folder at ``url`` (a local path or any fsspec URL)."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self.store: LocalStore | None = None
        """What objects of a remote cache are read through; whoever opens one to read it again and again sets it."""
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url, **_client_options(self.url))
        except (ImportError, ValueError) as error:
            raise CacheError(f"cannot open {self.url}: {error}") from None
        self.root = str(root).rstrip("/")

    @property
    def local_path(self) -> Path | None:
        """The folder on this machine's disk, None when it is elsewhere."""
        return Path(self.root) if isinstance(self._fs, LocalFileSystem) else None

    @property
    def store_kind(self) -> type:
        """What tells the kinds of places apart, in each of which a root means something else."""
        return type(self._fs)

    def read(self, name: str) -> bytes:
        """Return the bytes of object ``name``; raises ``FileNotFoundError``.

        What a remote store fails to give is asked for again, twice; raises ``CacheError`` when that does not help.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except _FINAL:
                raise
            except Exception as error:
                if self.local_path is not None:
                    raise
                if pause_s is None:
                    raise CacheError(f"cannot reach {self.url}: {str(error) or type(error).__name__}") from None
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    def fetch(self, name: str, target: Path, callback: Callback) -> None:
        """Copy object ``name`` into the local file ``target`` in one request; raises what the file system raises."""
        self._fs.get_file(self._path(name), str(target), callback=callback)

    def exists(self, name: str) -> bool:
        """Whether object ``name`` is there."""
        with self._reachable():
            self._forget(name)
            return bool(self._fs.exists(self._path(name)))

    def size(self, name: str) -> int | None:
        """Bytes of object ``name``, None when it is missing."""
        try:
            with self._reachable():
                self._forget(name)
                return int(self._fs.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def names(self, directory: str = "") -> list[str]:
        """Sorted names (relative to the folder) of what lies directly in ``directory``; empty if there is none."""
        try:
            with self._reachable():
                self._forget(directory)
                found = self._fs.ls(self._path(directory), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (str(path).rstrip("/").removeprefix(self.root).lstrip("/") for path in found)
        # Some tools mark a directory of a store by an empty object of its name.
        return sorted(name for name in names if name not in ("", directory))

    def write(self, name: str, data: bytes) -> None:
        """Write object ``name`` so that it is seen either whole or not at all, and survives a power cut.

        Raises ``CacheError`` when it cannot be written (a full disk, no permission, a store that refuses).
        """
        local = self.local_path
        try:
            if local is None:
                with self._reachable():
                    self._fs.pipe_file(self._path(name), data)
            else:
                _write_whole(local / name, data)
        except OSError as error:
            raise CacheError(
                f"cannot write {self._path(name)} ({len(data):,} bytes): {error.strerror or error}; what was finished "
                "before stays, and the same command goes on from there"
            ) from None

    def create(self, name: str, data: bytes) -> bool:
        """Write object ``name`` unless there is one; return whether it was written.

        Of several processes that do so at once one succeeds, if the store has conditional writes; where it has none,
        two may. Raises ``CacheError`` when it cannot be written.
        """
        try:
            self._fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except Exception:  # each client says in its own way that its store knows no conditions
            if self.exists(name):
                return False
            self.write(name, data)
        return True

    def remove(self, name: str) -> None:
        """Remove object ``name`` if it is there."""
        with self._reachable(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        """Turn what the clients of remote stores raise (each its own kinds) into one readable error."""
        try:
            yield
        except (OSError, CacheError):
            raise
        except Exception as error:
            raise CacheError(f"cannot reach {self.url}: {str(error) or type(error).__name__}") from None

    def _forget(self, name: str) -> None:
        self._fs.invalidate_cache(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def __str__(self) -> str:
        return self.url


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
