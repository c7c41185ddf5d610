"""A Python that has imported torch, transformers and kdcache already, for tests that start many processes.

The fixture ``preloaded`` is the path of an executable that takes the arguments of ``python``: ``-m MODULE ...`` or
``SCRIPT ...``. Every call runs in a process of its own with the caller's directory, environment and standard streams,
and ends with its exit code; the process is forked from a server that did the imports, which take seconds otherwise.
What is read at import (``HF_HUB_OFFLINE``, ``OMP_NUM_THREADS``) is that of the tests. Tests about imports or about
killed processes need a real Python.

This file is the fixture and the server (``python -m tests.preloaded SOCKET``).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Modules that kdcache imports when it needs them.
MODULES = (
    *("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert"),
    *("transformers.models.t5.modeling_t5", "transformers.trainer", "accelerate", "peft", "datasets"),
)
CLIENT = Path(__file__).with_name("preloaded_client.py")


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of an executable as in this module's description."""
    folder = tmp_path_factory.mktemp("preloaded")
    path, python = folder / "socket", folder / "python"
    client = [sys.executable, "-I", "-S", str(CLIENT), str(path)]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    python.chmod(0o755)
    server = subprocess.Popen([sys.executable, "-m", "tests.preloaded", str(path)], cwd=Path(__file__).parents[1])
    while not path.exists():
        assert server.poll() is None, "the server of preloaded processes has ended"
        time.sleep(0.05)
    yield str(python)
    server.terminate()
    server.wait(timeout=60)


def serve(path: str) -> None:
    """Import, then fork a process for every call."""
    import kdcache

    names = [module.name for module in pkgutil.walk_packages(kdcache.__path__, "kdcache.")]
    for name in (*names, *MODULES):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # handlers are not waited for
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path + ".new")
        server.listen(64)
        os.rename(path + ".new", path)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                handle(connection)
            connection.close()


def handle(connection: socket.socket) -> None:
    """Fork the process of a call, say how it ended, and end it where its caller is gone."""
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    length, request = int.from_bytes(header, "big"), b""
    while len(request) < length:
        request += connection.recv(length - len(request))
    child = os.fork()
    if child == 0:
        connection.close()
        become(json.loads(request), streams)
    ended = os.pidfd_open(child)
    if connection in select.select([connection, ended], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def become(request: dict, streams: list[int]) -> None:
    """Run what was asked for in this process, and end as Python does."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *rest = request["arguments"]
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *rest]
        runpy.run_path(first, run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
