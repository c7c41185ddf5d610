"""One policy for every operation on a remote store: what may pass is tried again, what is final is not."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections import Counter
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kdcache.cache import open_cache
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.storage import retry
from kdcache.storage.folder import Folder
from kdcache.storage.lease import LEASE, Lease
from kdcache.storage.local_store import LocalStoreConfig
from kdcache.verify.stored import verify_cache
from tests.cache.http_store import serving
from tests.cache.test_reader import check_batch
from tests.cache.test_writer import content_of
from tests.caches import SOURCE

PAUSES_S = (0.001, 0.001, 0.001, 0.001)
ATTEMPTS = len(PAUSES_S) + 1


class ClientError(Exception):
    """As botocore's: the answer of the server."""

    def __init__(self, status: int) -> None:
        super().__init__(f"answer {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def answered(status: int, kind: type[OSError] = OSError) -> OSError:
    """An error as s3fs makes it of an answer."""
    error = kind(errno.EIO, f"answer {status}") if kind is OSError else kind(f"answer {status}")
    error.__cause__ = ClientError(status)
    return error


class FaultyStore(MemoryFileSystem):
    """A store whose requests fail as told: ``faults`` before a request has its effect, ``lost`` ones after it."""

    protocol = "faulty"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    faults: ClassVar[list[BaseException]] = []
    lost: ClassVar[list[BaseException]] = []
    requests: ClassVar[Counter[str]] = Counter()
    busy_every: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def _request(self, name, *arguments, **options):
        self.requests[name] += 1
        if self.faults:
            raise self.faults.pop(0)
        if self.busy_every and sum(self.requests.values()) % self.busy_every == 0:
            raise answered(503)
        result = getattr(MemoryFileSystem, name)(self, *arguments, **options)
        if self.lost:
            raise self.lost.pop(0)
        return result

    def cat_file(self, path, **options):
        return self._request("cat_file", path, **options)

    def info(self, path, **options):
        return self._request("info", path, **options)

    def ls(self, path, **options):
        return self._request("ls", path, **options)

    def rm_file(self, path):
        return self._request("rm_file", path)

    def get_file(self, path, target, **options):
        return self._request("get_file", path, target)

    def pipe_file(self, path, value, mode="overwrite", **options):
        if mode == "create" and path in self.store:
            self.requests["pipe_file"] += 1
            raise FileExistsError(path)
        return self._request("pipe_file", path, value)


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES_S", PAUSES_S)
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    for name in ("store", "faults", "lost", "requests"):
        monkeypatch.setattr(FaultyStore, name, type(getattr(FaultyStore, name))())
    folder = Folder("faulty://bucket/cache")
    folder.write("a", b"content")
    FaultyStore.requests.clear()
    return folder


OPERATIONS = {
    "read": (lambda folder, path: folder.read("a"), b"content"),
    "size": (lambda folder, path: folder.size("a"), 7),
    "exists": (lambda folder, path: folder.exists("a"), True),
    "exists not": (lambda folder, path: folder.exists("b"), False),
    "names": (lambda folder, path: folder.names(), ["a"]),
    "write": (lambda folder, path: folder.write("b", b"more"), None),
    "create": (lambda folder, path: folder.create("b", b"more"), True),
    "remove": (lambda folder, path: folder.remove("a"), None),
    "fetch": (lambda folder, path: folder.fetch("a", path / "a"), None),
}


def passing() -> list[BaseException]:
    """One error of each kind that may pass."""
    disguised = FileNotFoundError("as fsspec's HTTP client reports any failure of a HEAD and a GET")
    disguised.__cause__ = ClientError(503)
    return [
        answered(503),
        answered(500),
        answered(429),
        answered(408),
        answered(409),
        disguised,
        ConnectionResetError("reset by peer"),
        TimeoutError("no answer"),
        RuntimeError("a client's own error"),
    ]


def final() -> list[BaseException]:
    """One error of each kind that no further attempt changes."""
    return [
        PermissionError("access denied"),
        answered(403, PermissionError),
        answered(404, FileNotFoundError),
        answered(400),
        answered(501),
        FileNotFoundError("no such object"),
        OSError(errno.ENOSPC, "No space left on device"),
        NotImplementedError(),
        ValueError("a bucket's name has no such character"),
    ]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_survives_what_may_pass(folder, tmp_path, operation):
    act, expected = OPERATIONS[operation]
    for error in passing():
        folder.remove("b")
        folder.write("a", b"content")
        FaultyStore.requests.clear()
        FaultyStore.faults[:] = [error] * (ATTEMPTS - 1)
        assert act(folder, tmp_path) == expected, error
        assert not FaultyStore.faults
        assert max(FaultyStore.requests.values()) == ATTEMPTS


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_gives_up_in_the_end(folder, tmp_path, operation):
    act, _ = OPERATIONS[operation]
    for error in passing():
        FaultyStore.faults[:] = [error] * (4 * ATTEMPTS)
        with pytest.raises((CacheError, retry.RetriesExhaustedError), match=f"in {ATTEMPTS} attempts"):
            act(folder, tmp_path)
        FaultyStore.faults.clear()


@pytest.mark.parametrize("operation", ["read", "size", "names", "write", "remove", "fetch"])
def test_final_errors_are_not_tried_again(folder, tmp_path, operation):
    act, _ = OPERATIONS[operation]
    for error in final():
        FaultyStore.faults[:] = [error]
        FaultyStore.requests.clear()
        with contextlib.suppress(Exception):
            act(folder, tmp_path)
        assert sum(FaultyStore.requests.values()) == 1, error


def test_no_permission_to_create_is_not_tried_otherwise(folder):
    FaultyStore.faults[:] = [answered(403, PermissionError)]
    with pytest.raises(CacheError, match=r"cannot write .*b .*answer 403"):
        folder.create("b", b"mine")
    assert sum(FaultyStore.requests.values()) == 1


def test_a_local_folder_is_never_tried_again(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    tries = []

    def read_local(name, max_bytes):
        tries.append(name)
        raise OSError(errno.EIO, "a disk that fails")

    monkeypatch.setattr(folder, "_read_local", read_local)
    with pytest.raises(OSError, match="a disk that fails"):
        folder.read("a")
    assert len(tries) == 1


@pytest.mark.parametrize("error", [answered(503), ConnectionResetError("reset by peer")])
def test_a_lost_answer_to_a_creation_is_not_somebody_else(folder, error):
    FaultyStore.lost[:] = [error]
    assert folder.create("b", b"mine")
    assert folder.read("b") == b"mine"
    assert not folder.create("b", b"of another")
    assert folder.read("b") == b"mine"


def test_an_object_that_another_process_creates_during_the_pause_stays(folder, monkeypatch):
    FaultyStore.faults[:] = [answered(503)]
    monkeypatch.setattr(retry.time, "sleep", lambda _: folder.write("b", b"of another"))
    assert not folder.create("b", b"mine")
    assert folder.read("b") == b"of another"


def test_a_lease_survives_a_lost_answer_to_its_creation(folder, monkeypatch):
    real = Folder.create

    def create(self, name, data):
        FaultyStore.lost[:] = [answered(503)]
        return real(self, name, data)

    monkeypatch.setattr(Folder, "create", create)
    lease = Lease(folder, watch_s=0.4)
    lease.acquire()
    lease.check()
    lease.release()
    assert not FaultyStore.lost
    assert not folder.exists(LEASE)


def test_a_lost_answer_to_a_removal_is_a_removal(folder):
    FaultyStore.lost[:] = [answered(503)]
    folder.remove("a")
    assert not folder.exists("a")


@pytest.mark.parametrize("busy_every", [2, 3])
def test_a_cache_is_written_and_read_through_a_busy_store(folder, monkeypatch, tmp_path, sound, busy_every):
    folder.remove("a")
    monkeypatch.setattr(FaultyStore, "busy_every", busy_every)
    SOURCE.write(folder.url, shards=range(1), finish=False)
    SOURCE.write(folder.url)
    assert content_of(folder.url) == content_of(sound)
    assert verify_cache(folder.url, deep=True).problems == []
    with open_cache(folder.url, local_store=LocalStoreConfig(directory=str(tmp_path))) as cache:
        check_batch(cache.read([12, 0, 7]), SOURCE, [12, 0, 7])
    assert FaultyStore.requests["pipe_file"] > 20
    assert not folder.exists(LEASE)


def test_damaged_bytes_are_read_again(folder):
    sha256 = hashlib.sha256(b"content").hexdigest()
    assert folder.read("a", sha256) == b"content"
    with pytest.raises(CorruptCacheError, match="file a of faulty://bucket/cache is damaged"):
        folder.read("a", "0" * 64)
    assert FaultyStore.requests["cat_file"] == 1 + ATTEMPTS


def test_an_http_server_that_is_busy_does_not_seem_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "PAUSES_S", PAUSES_S)
    (tmp_path / "a").write_bytes(b"content")
    with serving(tmp_path) as server:
        folder = Folder(server.url)
        server.fault = lambda path, number, data: (503, b"busy") if number < 3 else None
        assert folder.exists("a")
        server.fault = lambda path, number, data: (503, b"busy")
        for act in (folder.exists, folder.size, folder.read):
            with pytest.raises(CacheError, match="cannot reach http"):
                act("a")
        assert not folder.exists("b")
        with pytest.raises(FileNotFoundError):
            folder.read("b")


def test_pauses_grow_and_vary(monkeypatch):
    slept = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)

    def fail():
        raise TimeoutError

    for _ in range(50):
        with pytest.raises(retry.RetriesExhaustedError, match="TimeoutError"):
            retry.retrying(fail)
    steps = [slept[start :: len(retry.PAUSES_S)] for start in range(len(retry.PAUSES_S))]
    for mean_s, step in zip(retry.PAUSES_S, steps, strict=True):
        assert all(0.5 * mean_s <= pause_s <= 1.5 * mean_s for pause_s in step)
        assert len(set(step)) > 40
    assert list(retry.PAUSES_S) == sorted(retry.PAUSES_S)
