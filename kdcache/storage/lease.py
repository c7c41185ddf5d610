"""A lease: the object that names the one writer of a folder on an object store, where file locks do not work.

``writer.json`` names its holder and contains a counter that the holder increases regularly. A second writer that finds
the object watches it: if the counter changes, the holder is alive; if it stands still, the holder is dead and its lease
is taken over. No clocks are compared, so machines may disagree about the time.

A holder that was silent for that long (a suspended machine, a lost network) finds another token when it wakes up, and
stops before it commits anything. Checking the lease and committing are two requests, which no object store makes
atomic: a writer that is delayed *between* the two for longer than the watch may still commit a shard whose files its
successor has removed. `CacheWriter.finalise` therefore checks that every file exists before it writes a manifest.

On a store without conditional writes, two writers that start in the same second may both take the lease; one of them
finds out at its next beat, and at the latest before it commits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from pydantic import Field, ValidationError

from kdcache.config import Config
from kdcache.errors import CacheError
from kdcache.storage.folder import Folder

log = logging.getLogger(__name__)

#: Name of the object.
LEASE = "writer.json"
#: More than any lease has.
_MAX_BYTES = 1 << 20
#: Seconds without a change of the counter after which the holder counts as dead.
WATCH_S = 20.0
#: Increases of the counter during a watch: single ones may be late or get lost.
_BEATS = 4


class LeaseRecord(Config):
    """Content of the object."""

    token: str
    host: str
    pid: int = Field(ge=0, lt=2**31)
    machine: str
    """The scope of ``pid``: one boot of one machine, and one container on it; empty if unknown."""
    counter: int = 0

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n").encode()


class Lease:
    """The lease on ``folder`` of this process, once `acquire` has returned; safe to use from several threads."""

    def __init__(self, folder: Folder, *, watch_s: float = WATCH_S) -> None:
        self.folder = folder
        self.watch_s = watch_s
        self._record = LeaseRecord(
            token=secrets.token_hex(16), host=socket.gethostname(), pid=os.getpid(), machine=_machine()
        )
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease and keep it alive; watches the lease of another writer for up to ``watch_s`` seconds.

        Raises ``CacheError``, naming host and process, when that writer is alive.
        """
        while not self._try_to_take():
            pass
        self._beating = threading.Thread(target=self._beat, name="kdcache-lease", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raise ``CacheError`` when this process no longer holds the lease."""
        with self._lock:
            found = self._read()
        if found is None or found.token != self._record.token:
            raise CacheError(self._lost(found))

    def release(self) -> None:
        """Give the lease back if this process still holds it."""
        self._stop.set()
        if self._beating is None:
            return
        self._beating.join()
        self._beating = None
        with contextlib.suppress(CacheError, OSError):  # the object stays, like that of a dead writer
            found = self._read()
            if found is not None and found.token == self._record.token:
                self.folder.remove(LEASE)

    def _try_to_take(self) -> bool:
        found = self._read()
        if found is None:
            return self.folder.create(LEASE, self._record.to_bytes())
        if not _is_dead(found):
            found = self._watch(found)
        if found is None:
            return False  # given back meanwhile
        self.folder.write(LEASE, self._record.to_bytes())
        # If several processes take over at once, the token of the last write stays, and all of them read it.
        time.sleep(self.watch_s / _BEATS / 2)
        found = self._read()
        if found is None or found.token != self._record.token:
            raise CacheError(self._held_by_another(found))
        return True

    def _watch(self, first: LeaseRecord) -> LeaseRecord | None:
        """Return the lease if its counter stands still during the watch, None when it is given back."""
        log.warning(
            "%s is leased by process %d on %s; watching for up to %.0f s whether it is alive",
            self.folder,
            first.pid,
            first.host,
            self.watch_s,
        )
        deadline = time.monotonic() + self.watch_s
        while time.monotonic() < deadline:
            time.sleep(self.watch_s / _BEATS / 4)
            found = self._read()
            if found is None:
                return None
            if found != first:
                raise CacheError(self._held_by_another(found))
        return first

    def _beat(self) -> None:
        while not self._stop.wait(self.watch_s / _BEATS):
            try:
                if not self._renew():
                    return
            except (CacheError, OSError) as error:
                log.warning("the lease on %s could not be renewed (%s); trying again", self.folder, error)

    def _renew(self) -> bool:
        with self._lock:
            found = self._read()
            if found is None or found.token != self._record.token:
                log.warning("%s", self._lost(found))
                return False
            self._record = self._record.model_copy(update={"counter": self._record.counter + 1})
            self.folder.write(LEASE, self._record.to_bytes())
        return True

    def _read(self) -> LeaseRecord | None:
        """Return the current lease; one that cannot be parsed counts as that of an unknown writer."""
        try:
            data = self.folder.read(LEASE, max_bytes=_MAX_BYTES)
        except FileNotFoundError:
            return None
        try:
            return LeaseRecord.model_validate_json(data)
        except ValidationError:
            return LeaseRecord(token=hashlib.sha256(data).hexdigest(), host="an unknown host", pid=0, machine="")

    def _held_by_another(self, found: LeaseRecord | None) -> str:
        who = f"process {found.pid} on {found.host}" if found else "one that has just ended"
        return f"another process is writing to {self.folder} ({who}); wait for it, or choose another output"

    def _lost(self, found: LeaseRecord | None) -> str:
        what = f"process {found.pid} on {found.host} has taken it over" if found else f"{LEASE} was removed"
        return (
            f"this process may no longer write to {self.folder}: {what}, which happens when a writer is silent for "
            f"{self.watch_s:.0f} s. Committed shards stay; let the other process finish, or run the command again"
        )


def _is_dead(record: LeaseRecord) -> bool:
    """Return whether the holder ran on this machine and has ended."""
    if not record.machine or record.machine != _machine():
        return False
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """Return a name of this boot of this machine and of the container, empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
