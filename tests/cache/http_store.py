"""A web server without listings or ranges that gives out a directory, and fails as it is told to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: What a fault makes of an answer: a status, and the bytes of which the header promises all of the file's.
Answer = tuple[int, bytes]
#: Called with the path and the number of the request for it (from 0); None answers as a sound server does.
Fault = Callable[[str, int, bytes], Answer | None]


class HttpStore:
    """The server: its ``url``, the requests for every path so far, and what goes wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: Counter[str] = Counter()
        self.fault: Fault = lambda path, number, data: None
        self.bytes_per_s: float | None = None
        self.most_at_once = 0
        self.is_gone = False
        self.url = ""
        self._now = 0
        self._lock = threading.Lock()

    def requests_of(self, directory: str) -> dict[str, int]:
        """Return the requests for the objects in ``directory``, by path."""
        return {path: count for path, count in self.requests.items() if path.startswith(directory)}

    def answer(self, path: str) -> Answer | None:
        """Return the answer to a request and count it; None is 404."""
        with self._lock:
            number = self.requests[path]
            self.requests[path] += 1
        file = self.directory / path
        if not file.is_file():
            return None
        data = file.read_bytes()
        return self.fault(path, number, data) or (200, data)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the requests that are answered at the same time."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        store = self.server.store
        path = self.path.lstrip("/")
        if store.is_gone:
            self.close_connection = True
            return
        with store.counted():
            answer = store.answer(path)
            if answer is None:
                self.send_error(404)
                return
            status, body = answer
            whole = (store.directory / path).stat().st_size if status == 200 else len(body)
            self.send_response(status)
            self.send_header("Content-Length", str(whole))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self._send(body)
            self.close_connection = len(body) != whole

    def do_HEAD(self) -> None:
        self.send_error(405)

    def _send(self, body: bytes) -> None:
        speed = self.server.store.bytes_per_s
        step = len(body) if speed is None else max(int(speed / 50), 1)
        for start in range(0, len(body), max(step, 1)):
            self.wfile.write(body[start : start + step])
            if speed is not None:
                self.wfile.flush()
                time.sleep(1 / 50)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    store: HttpStore


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[HttpStore]:
    """Serve ``directory`` until the end of the block."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.store = HttpStore(directory)
        server.store.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.store
        finally:
            server.store.is_gone = True  # also for connections that are still open
            server.shutdown()
            thread.join()
