"""Who may write to a cache on an object store; on a real S3 server, with writers that are processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from kdcache.cache import CacheWriter
from kdcache.errors import CacheError
from kdcache.storage.folder import Folder
from kdcache.storage.lease import LEASE, Lease
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import content_of
from tests.caches import SOURCE

WATCH_S = 0.8
#: For whoever watches a writer that beats, and so ends at once what it does: that a beat is late does not matter then.
PATIENT_S = 8.0

HOLD = """
import sys
from kdcache.cache import CacheWriter
from kdcache.storage.folder import Folder
with CacheWriter(Folder(sys.argv[1]), watch_s=0.8):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def url(object_store):
    return f"{object_store}/caches/one"


@pytest.fixture
def holder(url):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def lease_of(url: str) -> dict:
    return json.loads(Folder(url).read(LEASE))


def leave_lease(url: str) -> None:
    """What a writer of another machine leaves behind when it dies."""
    record = {"token": "x", "host": "elsewhere", "pid": 12, "machine": "another", "counter": 3}
    Folder(url).write(LEASE, json.dumps(record).encode())


def store(url: str, **changes: object) -> None:
    Folder(url).write(LEASE, json.dumps(lease_of(url) | changes).encode())


def test_a_second_writer_is_refused_with_host_and_process(url, holder):
    with pytest.raises(CacheError, match=rf"another process is writing to {url} \(process {holder.pid} on "):
        CacheWriter(Folder(url), watch_s=PATIENT_S).__enter__()
    holder.communicate("")
    assert not Folder(url).exists(LEASE)
    SOURCE.write(url)
    assert verify_cache(url, deep=True).ok


@pytest.mark.slow
def test_a_killed_writer_of_this_machine_is_replaced_without_watching(url, holder):
    holder.kill()
    holder.wait()
    assert Folder(url).exists(LEASE)
    began = time.monotonic()
    with CacheWriter(Folder(url), watch_s=60):
        assert time.monotonic() - began < 45
        assert lease_of(url)["pid"] == os.getpid()
    assert not Folder(url).exists(LEASE)


def test_a_lease_of_another_machine_that_stands_still_is_taken_over(url, caplog):
    leave_lease(url)
    began = time.monotonic()
    with CacheWriter(Folder(url), watch_s=WATCH_S):
        assert time.monotonic() - began > WATCH_S
        assert lease_of(url)["pid"] == os.getpid()
    assert "is leased by process 12 on elsewhere" in caplog.text


def test_a_lease_of_another_machine_that_changes_is_not(url):
    leave_lease(url)
    threading.Timer(WATCH_S / 2, store, [url], {"counter": 99}).start()
    with pytest.raises(CacheError, match="process 12 on elsewhere"):
        CacheWriter(Folder(url), watch_s=PATIENT_S).__enter__()


def test_a_writer_that_is_given_back_while_it_is_watched(url, holder):
    threading.Timer(WATCH_S / 10, holder.stdin.close).start()
    with CacheWriter(Folder(url), watch_s=PATIENT_S):
        assert lease_of(url)["pid"] == os.getpid()


def test_a_lease_lives_while_its_holder_works(url):
    with CacheWriter(Folder(url), watch_s=WATCH_S) as writer:
        first, deadline = lease_of(url)["counter"], time.monotonic() + 60
        while lease_of(url)["counter"] == first:
            assert time.monotonic() < deadline
            time.sleep(WATCH_S / 8)
        writer.check_right()


def test_who_lost_the_lease_commits_nothing(url):
    files = {"tokenizer.json": b"{}"}
    with CacheWriter(Folder(url), watch_s=60) as writer:
        writer.begin(SOURCE.plan(), SOURCE.table(), files)
        writer.write_shard(SOURCE.shard(0))
        store(url, token="of somebody else", host="elsewhere", pid=12)
        with pytest.raises(CacheError, match=r"no longer write to .*process 12 on elsewhere has taken it over"):
            writer.write_shard(SOURCE.shard(1))
        assert Folder(url).names("commits") == ["commits/000000.json"]
        with pytest.raises(CacheError, match="cannot be finished"):
            writer.finalise()
    assert lease_of(url)["host"] == "elsewhere"  # it is not ours to remove
    Folder(url).remove(LEASE)
    with CacheWriter(Folder(url), watch_s=60) as writer:  # no beat, which would write it again, falls into the removal
        for shard in writer.begin(SOURCE.plan(), SOURCE.table(), files):
            writer.write_shard(SOURCE.shard(shard))
        Folder(url).remove(LEASE)
        with pytest.raises(CacheError, match=f"{LEASE} was removed"):
            writer.finalise()
    assert not Folder(url).exists("manifest.json")


def test_a_commit_whose_files_a_successor_removed_ends_in_no_manifest(url):
    with CacheWriter(Folder(url), watch_s=WATCH_S) as writer:
        for shard in writer.begin(SOURCE.plan(), SOURCE.table(), {"tokenizer.json": b"{}"}):
            record = writer.write_shard(SOURCE.shard(shard))
        path = record.objects["targets"].path
        Folder(url).remove(path)
        with pytest.raises(CacheError, match=f"file {path} of shard {record.index} is missing; run the command again"):
            writer.finalise()
    SOURCE.write(url)
    assert verify_cache(url, deep=True).ok


def test_of_several_who_begin_at_once_one_writes(url):
    outcomes = [None] * 4
    ready = threading.Barrier(4)

    def begin(number: int) -> None:
        # Beats must come within a watch, and takers one after another within an eighth of it, on a busy machine too.
        lease = Lease(Folder(url), watch_s=4 * WATCH_S)
        ready.wait()
        try:
            lease.acquire()
            outcomes[number] = lease
        except CacheError:
            outcomes[number] = "refused"

    threads = [threading.Thread(target=begin, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("refused") == 3
    [winner] = [lease for lease in outcomes if lease != "refused"]
    winner.check()
    winner.release()


def test_of_several_who_take_over_at_once_one_writes(url):
    leave_lease(url)
    test_of_several_who_begin_at_once_one_writes(url)


def test_a_lease_that_nobody_can_read_is_watched_too(url):
    Folder(url).write(LEASE, b"{not JSON")
    with CacheWriter(Folder(url), watch_s=WATCH_S):
        assert lease_of(url)["pid"] == os.getpid()


@pytest.mark.parametrize("condition", ["honoured", "unknown"])
def test_create_writes_once(url, monkeypatch, condition):
    folder = Folder(url)
    if condition == "unknown":
        real = type(folder._fs).pipe_file

        def pipe_file(self, path, value, mode="overwrite", **options):
            if mode == "create":
                raise NotImplementedError("A header you provided implies functionality that is not implemented")
            return real(self, path, value, **options)

        monkeypatch.setattr(type(folder._fs), "pipe_file", pipe_file)
    assert folder.create("x", b"first")
    assert not folder.create("x", b"second")
    assert folder.read("x") == b"first"


def test_what_other_processes_wrote_is_seen_at_once(url):
    folder = Folder(url)
    folder.write("a", b"1")
    assert folder.names() == ["a"]
    code = "import sys, s3fs; s3fs.S3FileSystem().pipe_file(sys.argv[1] + '/b', b'22')"
    subprocess.run([sys.executable, "-c", code, url], check=True)
    assert (folder.names(), folder.size("b"), folder.exists("b")) == (["a", "b"], 2, True)
    fsspec.filesystem("s3").rm_file(f"{url}/a")
    assert (folder.names(), folder.size("a"), folder.exists("a")) == (["b"], None, False)


def test_a_cache_on_s3_equals_a_local_one(url, sound):
    SOURCE.write(url, shards=range(1), finish=False)
    SOURCE.write(url)
    assert content_of(url) == content_of(sound)
    assert verify_cache(url, deep=True).problems == []
    assert not Folder(url).exists(LEASE)


def test_a_bucket_that_is_not_there(object_store):
    with pytest.raises(CacheError, match=r"cannot read s3://no-such-bucket/cache/.*: the bucket does not exist; check"):
        SOURCE.write("s3://no-such-bucket/cache")


def test_a_lease_that_nobody_can_have_is_of_an_unknown_writer():
    folder = Folder("memory://stranger/of/a/lease")
    sound = Lease(folder)._record.model_dump()
    for pid in (10**30, -1, 2**31):
        folder.write(LEASE, json.dumps({**sound, "pid": pid}).encode())
        assert Lease(folder)._read().host == "an unknown host", pid
    folder.write(LEASE, bytes(2 << 20))
    with pytest.raises(CacheError, match=r"file writer\.json of .* has 2,097,152 bytes, at most 1,048,576"):
        Lease(folder)._read()
