"""Read the codes of a cache with MosaicML Streaming; run it in a separate environment.

    PYTHON reader_mosaic.py CODES.npy OFFSETS.npy DIRECTORY ROUNDS BATCH_SEQUENCES

Its requirements (numpy below 2.2, transformers below 5) conflict with those of kdcache. So `benchmarks.reader --mosaic
PYTHON` runs this file with another interpreter. It writes one sample per sequence, uncompressed, with all arrays in one
array of bytes. It prints JSON: its version, the bytes on disk, and the seconds of every round over the shuffled
samples.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import streaming


def write(codes_file: str, offsets_file: str, directory: str) -> None:
    codes, offsets = np.load(codes_file, mmap_mode="r"), np.load(offsets_file).tolist()
    columns = {"codes": "ndarray:uint8"}
    with streaming.MDSWriter(out=directory, columns=columns) as writer:
        for start, stop in itertools.pairwise(offsets):
            writer.write({"codes": np.array(codes[start:stop])})


def read(directory: str, batch_sequences: int) -> tuple[float, int]:
    began = time.perf_counter()
    dataset = streaming.StreamingDataset(local=directory, shuffle=True, batch_size=batch_sequences)
    num_positions = sum(len(sample["codes"]) for sample in dataset)
    return time.perf_counter() - began, num_positions


if __name__ == "__main__":
    codes_file, offsets_file, directory, num_rounds, batch_sequences = sys.argv[1:]
    streaming.base.util.clean_stale_shared_memory()
    write(codes_file, offsets_file, directory)
    rounds = [read(directory, int(batch_sequences)) for _ in range(int(num_rounds) + 1)]
    result = {
        "version": streaming.__version__,
        "num_bytes": sum(file.stat().st_size for file in Path(directory).rglob("*.mds")),
        "num_positions": rounds[0][1],
        "seconds": [seconds for seconds, _ in rounds[1:]],
    }
    print(json.dumps(result))
