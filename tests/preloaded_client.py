"""What stands where a Python is expected (see tests/preloaded.py): ``preloaded_client.py SOCKET PYTHON ARGUMENT...``.

``PYTHON`` is the path of the executable that runs this.

A script that imports next to nothing, so that it costs next to nothing.
"""

import json
import os
import socket
import sys


def call(path: str, python: str, arguments: list[str]) -> int:
    """Have the server run these arguments of ``python`` with what this process was given; return how it ended."""
    numbers = [0, 1, 2]
    numbers += [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2 and _is_inherited(int(name))]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = {
            "python": python,
            "arguments": arguments,
            "directory": os.getcwd(),
            "environment": dict(os.environ),
            "numbers": numbers,
        }
        message = json.dumps(request).encode()
        socket.send_fds(server, [len(message).to_bytes(8, "big")], numbers)
        server.sendall(message)
        return int(server.recv(16) or b"1")


def _is_inherited(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


if __name__ == "__main__":
    code = call(sys.argv[1], sys.argv[2], sys.argv[3:])
    if code < 0:  # a signal, of which the caller is to know
        os.kill(os.getpid(), -code)
    sys.exit(code)
