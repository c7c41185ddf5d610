"""A Python that has imported torch, transformers and kdcache already, for tests that start many processes.

The fixture ``preloaded`` is the path of an executable that takes the arguments of ``python``: ``-m MODULE ...``, ``-c
CODE ...`` or ``SCRIPT ...``. Every call runs in a process of its own with the directory, environment, standard streams
and open files that it was given, and ends with its exit code or signal; the process is forked from a server that did
the imports, which take seconds otherwise. Whoever kills what was started kills the process, too. The processes that it
starts with ``sys.executable`` or multiprocessing are made in the same way.

A real Python is needed by tests about imports, about memory, and about variables that are read at import
(``HF_HUB_OFFLINE``, ``OMP_NUM_THREADS``: here those of the tests).

This file is the fixture and the server (``python -m tests.preloaded SOCKET``).
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import multiprocessing.spawn
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
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    client = [sys.executable, "-I", "-S", str(CLIENT), str(path), str(python)]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    python.chmod(0o755)
    server = subprocess.Popen([sys.executable, "-m", "tests.preloaded", str(path)], cwd=Path(__file__).parents[1])
    while not path.exists():
        assert server.poll() is None, "the server of preloaded processes has ended"
        time.sleep(0.05)
    yield str(python)
    server.terminate()
    server.wait(timeout=60)


@pytest.fixture(scope="module")
def preloaded_workers(preloaded: str) -> Iterator[None]:
    """Start the processes that multiprocessing spawns (those of sweeps) in the same way."""
    real = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(preloaded)
    yield
    multiprocessing.set_executable(real)


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
    header, streams, _, _ = socket.recv_fds(connection, 8, 64)
    length, message = int.from_bytes(header, "big"), b""
    while len(message) < length:
        message += connection.recv(length - len(message))
    child = os.fork()
    if child == 0:
        become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    if connection in select.select([connection, ended], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Run what was asked for in this process, and end as Python does."""
    above = 1 + max(*request["numbers"], *streams)
    copies = [fcntl.fcntl(stream, fcntl.F_DUPFD, above) for stream in streams]
    os.closerange(3, above)  # the server's own among them
    for number, copy in zip(request["numbers"], copies, strict=True):
        os.dup2(copy, number)
        os.close(copy)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    # What this process starts with its own interpreter is preloaded as well.
    sys.executable = request["python"]
    multiprocessing.set_executable(sys.executable)
    arguments = request["arguments"]
    while arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        arguments = arguments[1:]  # an option of the interpreter
    kind, *rest = arguments
    if kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = os.getcwd(), ["-c", *rest[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0], sys.argv = str(Path(kind).resolve().parent), [kind, *rest]
        runpy.run_path(kind, run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
