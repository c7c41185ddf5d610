"""Dump: run the teacher over planned sequences and write its answers, shard by shard.

`dump` is the loop over ready-made parts, which a test drives with a fake teacher; `dump_teacher` loads the parts that a
configuration names. A second thread encodes and writes a shard while the teacher works on the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import CacheWriter, ShardBuilder, ShardData
from kdcache.cache.tail_prior import TailSum
from kdcache.cache.write_behind import WriteBehind
from kdcache.dump.answers import answers, request_of, staged
from kdcache.dump.config import DumpConfig
from kdcache.dump.loading import load_parts
from kdcache.fields import known_fields
from kdcache.progress import bar
from kdcache.schema import Manifest, Plan, ShardRecord
from kdcache.storage.folder import Folder
from kdcache.tasks import Sequences, Task, task_of
from kdcache.teachers.base import Teacher, add_tail_sums


@dataclass
class DumpResult:
    """What a dump did: the finished manifest, and what this run added to it."""

    output: str
    manifest: Manifest
    num_shards_written: int
    num_positions_written: int
    teacher_s: float


def dump_teacher(config: DumpConfig, *, progress: bool = True) -> DumpResult:
    """Run the teacher of ``config`` over its corpus and write (or finish) the cache at ``config.output``.

    Raises ``ConfigError``, ``CorpusError``, ``TeacherError`` or ``CacheError``; what was committed before stays, and
    the same call resumes from there.
    """
    parts = load_parts(config, progress)
    with CacheWriter(Folder(config.output)) as writer:
        return dump(
            parts.sequences,
            parts.teacher,
            parts.plan,
            writer,
            table=parts.table,
            starts=parts.starts,
            tokenizer_files=parts.tokenizer_files,
            cache_files=parts.cache_files,
            batch_tokens=parts.batch_tokens,
            progress=progress,
        )


def dump(
    sequences: Sequences,
    teacher: Teacher,
    plan: Plan,
    writer: CacheWriter,
    *,
    table: Any,
    starts: NDArray[np.int64],
    tokenizer_files: dict[str, bytes],
    batch_tokens: int,
    cache_files: dict[str, bytes] | None = None,
    progress: bool = False,
) -> DumpResult:
    """Write every shard of ``plan`` that is not committed yet, then the manifest.

    Raises ``TeacherError`` before anything is written when ``teacher`` cannot give what the plan asks for.
    """
    teacher.check(request_of(plan))
    missing = writer.begin(plan, table, tokenizer_files, cache_files)
    ends = np.concatenate([[0], np.cumsum(sequences.lengths_N)])
    positions_of = [int(ends[starts[s + 1]] - ends[starts[s]]) for s in range(plan.num_shards)]
    todo = sum(positions_of[s] for s in missing)
    task = task_of(plan.task)
    unit = task.unit
    began = time.perf_counter()
    with bar(
        plan.num_positions,
        "teacher",
        "tok" if unit == "token" else unit,
        enabled=progress,
        initial=plan.num_positions - todo,
    ) as meter:
        # One shard may wait while another is written: with the one that is made, memory holds three.
        with WriteBehind(writer.write_shard, max_pending=2) as writes:

            def after_batch(num_positions: int) -> None:
                meter.update(num_positions)
                writes.check()

            for shard in missing:
                data = _run_shard(shard, task, sequences, starts, teacher, plan, batch_tokens, after_batch)
                writes.put(data)
                _show_bytes(meter, writes.written, unit)
            teacher_s = time.perf_counter() - began
        _show_bytes(meter, writes.written, unit)
    manifest = writer.finalise()
    return DumpResult(str(writer.folder), manifest, len(writes.written), todo, teacher_s)


def _run_shard(
    shard: int,
    task: Task,
    sequences: Sequences,
    starts: NDArray[np.int64],
    teacher: Teacher,
    plan: Plan,
    batch_tokens: int,
    after_batch: Callable[[int], None],
) -> ShardData:
    begin, end = int(starts[shard]), int(starts[shard + 1])
    fields = known_fields(plan)
    builder = ShardBuilder(shard, fields)
    tail_sum: TailSum | None = None
    members = [sequences.sequence(index) for index in range(begin, end)]
    for batch, answer in answers(teacher, members, request_of(plan), batch_tokens):
        builder.put([sequence.index - begin for sequence in batch], batch, staged(answer, fields))
        tail_sum = add_tail_sums(iter((tail_sum, answer.tail_sum)))
        after_batch(sum(s.num_positions for s in batch))
    return builder.build(sequences.sequence_table(begin, end), task.stored_labels, tail_sum=tail_sum)


def _show_bytes(meter: Any, written: list[ShardRecord], unit: str) -> None:
    if written:
        size = sum(record.num_bytes for record in written) / sum(record.num_positions for record in written)
        meter.set_postfix_str(f"{size:.0f} bytes/{unit}, {len(written)} shards written")
