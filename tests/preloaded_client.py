"""What stands where a Python is expected (see tests/preloaded.py): ``preloaded_client.py SOCKET ARGUMENT...``.

A script that imports next to nothing, so that it costs next to nothing.
"""

import json
import os
import socket
import sys


def call(path: str, arguments: list[str]) -> int:
    """Have the server run these arguments of ``python``; return the exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
        message = json.dumps(request).encode()
        socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(message)
        return int(server.recv(16) or b"1")


if __name__ == "__main__":
    sys.exit(call(sys.argv[1], sys.argv[2:]))
