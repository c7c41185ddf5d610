"""The memory that a run takes, in a process of its own.

As a script (``python -m tests.memory_probe warm.json run.json``): trains the first configuration once so that all
libraries are loaded, then the second for two steps, and prints by how many bytes the process has grown at most.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from tests.train_runs import train


def peak_bytes() -> int:
    """The most memory that this process has had, since it was started as a program of its own."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Not ru_maxrss, which on Linux remembers the process that started this one, and a long test run is large.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Stop(TrainerCallback):
    """Print what the process has grown by after two steps, and leave without saving."""

    def __init__(self, before: int) -> None:
        self.before = before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            print(peak_bytes() - self.before, flush=True)
            os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm, values = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    train(warm)
    train(values, callbacks=[Stop(psutil.Process().memory_info().rss)])
