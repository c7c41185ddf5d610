"""A lease: the object that says who writes to a cache on an object store, where operating system locks do not reach.

``writer.json`` names its holder and carries a counter that the holder changes all the time. Who finds one watches it:
a counter that changes belongs to a writer that lives, and one that stands still to a dead one, whose lease is taken
over. No clocks are compared, so machines may disagree about the time.

A holder that was silent for so long (a suspended machine, a network that went away) and wakes up finds another token
and stops before it commits anything. Looking and committing are two requests, and no object store joins them: a
writer that is held up *between* the two for longer than others watch may still commit a shard whose files its
successor has removed. `CacheWriter.finalise` therefore looks for every file before it writes a manifest.

On a store without conditional writes two writers that begin in the same second may both believe that they are first;
one of them finds out at its next beat, and no later than before it commits.
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

from pydantic import ValidationError

from kdcache.config import Config
from kdcache.errors import CacheError
from kdcache.storage.folder import Folder

log = logging.getLogger(__name__)

#: Name of the object.
LEASE = "writer.json"
#: Seconds that a lease is watched before its holder is taken for dead.
WATCH_S = 20.0
#: Beats of a holder in the time that others watch: one may be late, or lost.
_BEATS = 4


class LeaseRecord(Config):
    """What the object holds."""

    token: str
    host: str
    pid: int
    machine: str
    """Which processes ``pid`` counts: of one start of one machine, and one container on it; empty if unknown."""
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
        """Take the lease and keep it alive; waits up to ``watch_s`` seconds where a dead writer may have left one.

        Raises ``CacheError``, naming host and process, when another writer holds it.
        """
        while not self._try_to_take():
            pass
        self._beating = threading.Thread(target=self._beat, name="kdcache-lease", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raise ``CacheError`` when the lease is no longer this process's."""
        with self._lock:
            found = self._read()
        if found is None or found.token != self._record.token:
            raise CacheError(self._lost(found))

    def release(self) -> None:
        """Give the lease back, if it is still this process's."""
        self._stop.set()
        if self._beating is None:
            return
        self._beating.join()
        self._beating = None
        with contextlib.suppress(CacheError, OSError):  # it is left behind, as that of a dead writer is
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
        # Of several who take over at once the last one's token stands, for all of them to see.
        time.sleep(self.watch_s / _BEATS / 2)
        found = self._read()
        if found is None or found.token != self._record.token:
            raise CacheError(self._refusal(found))
        return True

    def _watch(self, first: LeaseRecord) -> LeaseRecord | None:
        """Return the lease if it stands still for as long as it is watched, None when it is given back."""
        log.warning(
            "%s is leased by process %d on %s; looking for up to %.0f s whether it lives",
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
                raise CacheError(self._refusal(found))
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
        """Return the lease that lies there; one that cannot be read stands for a writer that nobody knows."""
        try:
            data = self.folder.read(LEASE)
        except FileNotFoundError:
            return None
        try:
            return LeaseRecord.model_validate_json(data)
        except ValidationError:
            return LeaseRecord(token=hashlib.sha256(data).hexdigest(), host="an unknown host", pid=0, machine="")

    def _refusal(self, found: LeaseRecord | None) -> str:
        who = f"process {found.pid} on {found.host}" if found else "one that has just ended"
        return f"another process is writing to {self.folder} ({who}); wait for it or choose another output"

    def _lost(self, found: LeaseRecord | None) -> str:
        what = f"process {found.pid} on {found.host} has taken it over" if found else f"{LEASE} was removed"
        return (
            f"this process may no longer write to {self.folder}: {what}, as happens when a writer does not answer for "
            f"{self.watch_s:.0f} s. What it had committed stays; let the other one finish, or run the command again"
        )


def _is_dead(record: LeaseRecord) -> bool:
    """Whether the holder ran on this very machine, and is gone."""
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
    """Return what tells this start of this machine, and this container on it, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
