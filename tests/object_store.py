"""An S3-compatible server on this machine: moto's, one per test process, as a process of its own.

Whatever these tests start finds it through the environment, as any client of a private object store does. The two
fixtures are registered in ``tests/conftest.py``; the server starts when the first test asks for a bucket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def object_store_server() -> Iterator[str]:
    """Start the server; give its address."""
    with contextlib.ExitStack() as stack:
        for attempt in range(3):  # another process may take the free port first
            try:
                address = stack.enter_context(running_server())
                break
            except ServerEnded:
                if attempt == 2:
                    raise
        yield address


@pytest.fixture
def object_store(object_store_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Make a bucket and return its URL; this process and its children reach it without further settings."""
    import s3fs

    monkeypatch.setenv("KDCACHE_STORE", str(tmp_path / "local-store"))
    for name, value in environment(object_store_server).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


def environment(address: str) -> dict[str, str]:
    """Return the environment variables by which S3 clients find the server at ``address``."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


class ServerEnded(RuntimeError):
    """The server's process ended before it answered."""


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """Run the server on a free port until the end of the block; give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, process)
            yield address
        finally:
            process.terminate()


def _wait_for(address: str, process: subprocess.Popen[bytes], limit_s: float = 180) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerEnded(f"moto's server at {address} ended at once, with exit code {process.returncode}")
        with contextlib.suppress(OSError):
            opener.open(f"{address}/moto-api/", timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"moto's server at {address} did not answer within {limit_s} s")
