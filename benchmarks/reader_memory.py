"""Measure the peak memory of reading a whole cache in the order of an epoch, in a separate process.

python -m benchmarks.reader_memory CACHE BATCH_SEQUENCES
"""

import sys
from pathlib import Path

from kdcache.cache import open_cache


def peak_bytes() -> int:
    """The most that this program has had; not ru_maxrss, which on Linux remembers the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    for _ in open_cache(sys.argv[1]).batches(int(sys.argv[2]), threads=1):
        pass
    print(peak_bytes())
