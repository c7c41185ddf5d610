from __future__ import annotations

import threading
import time

import pytest

from kdcache.cache.write_behind import WriteBehind


def test_items_are_written_in_order():
    with WriteBehind(lambda item: item * 10, max_pending=2) as writes:
        for item in range(7):
            writes.put(item)
            writes.check()
    assert writes.written == [0, 10, 20, 30, 40, 50, 60]


def test_no_more_items_wait_than_may():
    may_write, started = threading.Semaphore(0), []

    def write(item):
        may_write.acquire()
        return item

    def put_all(writes):
        for item in range(4):
            writes.put(item)
            started.append(item)

    with WriteBehind(write, max_pending=2) as writes:
        thread = threading.Thread(target=put_all, args=(writes,))
        thread.start()
        thread.join(0.2)
        assert started == [0, 1]
        may_write.release(4)
        thread.join()
    assert writes.written == [0, 1, 2, 3]


def test_a_failed_write_is_raised_at_the_next_check():
    failed = threading.Event()

    def write(item):
        try:
            raise OSError(28, "No space left on device")
        finally:
            failed.set()

    def work():
        with WriteBehind(write, max_pending=2) as writes:
            writes.put(0)
            failed.wait()
            for _ in range(1000):  # the future is done a moment after the event
                writes.check()
                time.sleep(0.001)
        raise AssertionError("the failed write was not noticed")

    with pytest.raises(OSError, match="No space left"):
        work()


def test_writes_behind_a_failed_one_are_dropped():
    go, calls = threading.Event(), []

    def write(item):
        calls.append(item)
        go.wait()
        raise OSError("disk full")

    def work():
        with WriteBehind(write, max_pending=3) as writes:
            for item in range(3):
                writes.put(item)
            go.set()

    with pytest.raises(OSError, match="disk full"):
        work()
    assert calls == [0]


def test_what_is_pending_is_written_when_the_work_fails():
    written = []

    def work():
        with WriteBehind(written.append, max_pending=3) as writes:
            for item in range(3):
                writes.put(item)
            raise ValueError("NaN")

    with pytest.raises(ValueError, match="NaN"):
        work()
    assert written == [0, 1, 2]


def test_a_failure_of_the_last_write_is_raised_when_the_context_is_left():
    def write(item):
        raise OSError("lease lost")

    with pytest.raises(OSError, match="lease lost"), WriteBehind(write) as writes:
        writes.put(0)
