"""How fast is a cache read and decoded to final log-probabilities, in order and shuffled?

In every round the same sequences are read, in turns, by (1) ``Cache.read`` in order, (2) in the order of a training
epoch, (3) as raw arrays without decoding, and (4) from a plain ``numpy`` memory map of the same codes: what a disk
and the copying cost when nothing is compressed, hashed or decoded. The cache is written for the purpose: realistic
sizes, synthetic contents.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import report
from benchmarks.synthetic import write_cache
from kdcache.cache import Cache, epoch_order, open_cache


def main() -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=400_000)
    parser.add_argument("--length", type=int, default=1024, help="positions per sequence")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--codec", default="compact")
    parser.add_argument("--shard-positions", type=int, default=65_536)
    parser.add_argument("--batch-sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        run(options, Path(directory))


def run(options, directory: Path) -> None:
    path = write_cache(
        directory / "cache",
        num_positions=options.positions,
        length=options.length,
        top_k=options.top_k,
        vocab_size=options.vocab_size,
        codec=options.codec,
        shard_positions=options.shard_positions,
    )
    bytes_per_token = open_cache(str(path)).manifest.bytes_per_token
    num_positions = open_cache(str(path)).manifest.num_positions
    codes = np.memmap(directory / "codes", np.uint8, "w+", shape=(num_positions, 3 * options.top_k))
    codes[:] = np.random.default_rng(0).integers(0, 255, codes.shape, dtype=np.uint8)
    batch = options.batch_sequences

    def chunks(order) -> list[list[int]]:
        return [order[n : n + batch].tolist() for n in range(0, len(order), batch)]

    def in_order() -> None:
        cache = open_cache(str(path))
        for indices in chunks(np.arange(len(cache))):
            cache.read(indices)

    def shuffled() -> None:
        cache = open_cache(str(path))
        for indices in chunks(shuffle(cache)):
            cache.read(indices)

    def raw() -> None:
        cache = open_cache(str(path))
        for shard in range(cache.manifest.num_shards):
            cache.open_shard(shard)

    def memory_map() -> None:
        cache = open_cache(str(path))
        for index in shuffle(cache):
            np.array(codes[index * options.length : (index + 1) * options.length])

    steps = {
        "read and decode, in order": in_order,
        "read and decode, shuffled": shuffled,
        "unpack shards, no decoding": raw,
        "memory map of raw codes, shuffled": memory_map,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - began)
    reference = times["read and decode, in order"]
    rows = [
        {
            "step": name,
            "tokens/s": num_positions / statistics.median(seconds),
            "of in order": statistics.median(r / s for r, s in zip(reference, seconds, strict=True)),
        }
        for name, seconds in times.items()
    ]
    title = f"reader: {num_positions:,} positions x {options.rounds} rounds, K = {options.top_k}"
    title += f", V = {options.vocab_size:,}"
    title += f", {options.codec}, {bytes_per_token:.1f} bytes/token, sequences of {options.length}, one torch thread"
    report.show(title, rows, {"options": vars(options), "bytes_per_token": bytes_per_token}, options.json)


def shuffle(cache: Cache) -> np.ndarray:
    return epoch_order(cache.shard_starts, seed=0, epoch=0, key=cache.order_key)


if __name__ == "__main__":
    main()
