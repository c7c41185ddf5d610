"""Measure how fast a cache is read and decoded to log-probabilities, in order and shuffled, against other readers.

In every round all ways (`benchmarks.reader_ways`) read the same sequences in turns, so that ratios hold on a busy
machine. The benchmark writes the cache: realistic sizes, synthetic contents. ``--memory`` also measures the peak memory
of reading a small cache and one of twenty times its size.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.reader_ways import ways_of
from benchmarks.synthetic import write_cache
from kdcache.cache import open_cache

REFERENCE = "read and decode, in the order of an epoch"
MOSAIC = "MosaicML Streaming of the codes"
#: The large cache of ``--memory`` by the small one.
FACTOR = 20


def main() -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=524_288)
    parser.add_argument("--length", type=int, default=1024, help="positions per sequence")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--codec", default="compact")
    parser.add_argument("--shard-positions", type=int, default=32_768)
    parser.add_argument("--batch-sequences", type=int, default=8)
    parser.add_argument("--zarr-sequences", type=int, default=16, help="sequences that zarr-python reads per round")
    parser.add_argument("--mosaic", metavar="PYTHON", help="interpreter of an environment with mosaicml-streaming")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory too")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        run(options, Path(directory))


def run(options, directory: Path) -> None:
    path = write(options, directory / "cache", options.positions, options.shard_positions)
    ways = ways_of(path, directory, options.batch_sequences, options.zarr_sequences)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(options.rounds + 1):
        for way in ways:
            began = time.perf_counter()
            way.read()
            if turn:
                seconds[way.name].append((time.perf_counter() - began) / way.num_positions)
    rows = [row(way.name, seconds[way.name], way.num_bytes / way.num_positions, seconds) for way in ways]
    mosaic, why_not = read_with_mosaic(options, directory)
    if mosaic is not None:
        each = [s / mosaic["num_positions"] for s in mosaic["seconds"]]
        name = f"{MOSAIC} ({mosaic['version']})"
        rows.append(row(name, each, mosaic["num_bytes"] / mosaic["num_positions"], seconds))
    manifest = open_cache(str(path)).manifest
    title = f"reader: {manifest.num_positions:,} positions x {options.rounds} rounds, K = {options.top_k}"
    title += f", V = {options.vocab_size:,}, {options.codec}, {manifest.bytes_per_token:.1f} bytes/token"
    title += f", {manifest.num_shards} shards, sequences of {options.length}, micro-batches of "
    title += f"{options.batch_sequences}, one torch thread"
    memory = peaks(options, directory) if options.memory else None
    result = {
        "options": vars(options),
        "bytes_per_token": manifest.bytes_per_token,
        "not_measured": {MOSAIC: why_not} if why_not else {},
        "memory": memory,
    }
    report.show(title, rows, result, options.json)
    if why_not:
        print(f"{MOSAIC}: not measured, {why_not}")
    if memory:
        print(memory["text"])


def write(options, path: Path, num_positions: int, shard_positions: int) -> Path:
    return write_cache(
        path,
        num_positions=num_positions,
        length=options.length,
        top_k=options.top_k,
        vocab_size=options.vocab_size,
        codec=options.codec,
        shard_positions=shard_positions,
    )


def row(name: str, per_position_s: list[float], num_bytes: float, seconds: dict[str, list[float]]) -> dict:
    """Return a row of the table; ratios are taken within a round."""
    ratios = [reference / own for reference, own in zip(seconds[REFERENCE], per_position_s, strict=True)]
    return {
        "way": name,
        "tokens/s": 1 / statistics.median(per_position_s),
        "of an epoch's order": statistics.median(ratios),
        "bytes per token": num_bytes or "as above",
    }


def read_with_mosaic(options, directory: Path) -> tuple[dict | None, str]:
    """Return what MosaicML Streaming took, or None and why that is not known."""
    if not options.mosaic:
        return None, "its pins do not go with those of kdcache: give --mosaic the Python of an environment that has it"
    script = Path(__file__).with_name("reader_mosaic.py")
    files = [str(directory / name) for name in ("codes.npy", "offsets.npy", "mosaic")]
    numbers = [str(options.rounds), str(options.batch_sequences)]
    done = subprocess.run([options.mosaic, str(script), *files, *numbers], capture_output=True, text=True)
    if done.returncode:
        return None, f"{options.mosaic} failed: {done.stderr.strip().splitlines()[-1:]}"
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


def peaks(options, directory: Path) -> dict:
    """Measure the peak memory of reading a small cache and a large one, whose shards have the same size."""
    per_shard = max(options.length, options.shard_positions // 8)
    small = max(16 * per_shard, options.positions // 4)
    measured = {}
    for factor in (1, FACTOR):
        path = write(options, directory / f"memory-{factor}", factor * small, per_shard)
        command = [sys.executable, "-m", "benchmarks.reader_memory", str(path), str(options.batch_sequences)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured[factor] = int(done.stdout)
    text = f"peak memory of reading {small:,} positions: {measured[1] / 1e6:.0f} MB; {FACTOR} times as many: "
    return {
        "num_positions": small,
        "peak_bytes": measured,
        "text": text + f"{measured[FACTOR] / 1e6:.0f} MB",
    }


if __name__ == "__main__":
    main()
