"""Verifying a cache: first that every byte is what was written, then (deep) that what it decodes to makes sense.

Hashes need no decoding and find any flipped bit; the deep pass finds what hashes cannot, a writer that wrote nonsense
correctly. Both only collect problems, each with file, shard and field, so one run names everything that is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.cache import layout
from kdcache.cache.columns import as_numpy
from kdcache.cache.head_file import check_head
from kdcache.cache.lookup import checked_plan_table
from kdcache.cache.reader import Cache
from kdcache.cache.sequence_table import load_table
from kdcache.cache.tail_prior import read_prior
from kdcache.errors import CacheError, CorruptCacheError, KdcacheError
from kdcache.fields import TARGETS_FIELD, TOKENS_FIELD
from kdcache.progress import bar, reporter
from kdcache.schema import (
    Manifest,
    ObjectRecord,
    Plan,
    Record,
    SequenceBatch,
    ShardRecord,
    token_hash,
)
from kdcache.storage.folder import TEMPORARY, Folder

Progress = Callable[[int, int], None]

#: Rows decoded at once by the deep pass, fewer if their hidden states would have more numbers than this.
_DEEP_POSITIONS = 1 << 16
_DEEP_STATES = 1 << 26


@dataclass
class VerifyReport:
    """What `verify` found; empty ``problems`` means the cache is sound."""

    path: str
    deep: bool
    num_files: int = 0
    """All files that were checked: objects, tokenizer, LM head, tail prior, plan and records."""
    num_shards: int = 0
    num_sequences: int = 0
    num_positions: int = 0
    num_objects: int = 0
    num_bytes: int = 0
    """Bytes of the objects."""
    problems: list[str] = field(default_factory=list)
    num_rewritable: int = 0
    """How many of the problems are of plan.parquet and the tokenizer's files, which a dump writes again."""
    unlisted: list[str] = field(default_factory=list)
    """Files beside the tokenizer that the manifest does not record; each is a problem."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_cache(path: str, *, deep: bool = False, progress: bool = True) -> VerifyReport:
    """Check size and hash of every file of the cache at ``path``; with ``deep`` also decode and check every position.

    Raises ``IncompleteCacheError`` or ``CacheError`` when ``path`` holds no finished cache.
    """
    with bar(0, "verify", "B", enabled=progress) as meter:
        return check_files(path, deep=deep, report_progress=reporter(meter))


def check_files(path: str, *, deep: bool = False, report_progress: Progress | None = None) -> VerifyReport:
    """Do what `verify_cache` does; ``report_progress`` is called with (bytes done, bytes in all)."""
    folder = Folder(path)
    report = VerifyReport(str(path), deep)
    try:
        manifest, fingerprint = layout.read_manifest(folder)
    except CorruptCacheError as error:
        report.problems.append(str(error))
        return report
    report.num_shards, report.num_sequences = manifest.num_shards, manifest.num_sequences
    report.num_positions = manifest.num_positions
    of_shards = sum(len(shard.objects) + 1 for shard in manifest.shards)  # and its commit record
    records = (layout.MANIFEST, layout.PLAN, layout.PLAN_TABLE)
    report.num_files = of_shards + len(records) + len(manifest.tokenizer_files) + len(manifest.cache_files)
    report.problems.extend(_check_rewritable(folder, manifest))
    report.num_rewritable = len(report.problems)
    report.unlisted.extend(_unlisted(folder, manifest))
    report.problems.extend(
        f"file {name} is not recorded in {layout.MANIFEST}; kdcache never reads it, but other programs may: delete it"
        for name in report.unlisted
    )
    report.problems.extend(_check_records(folder, manifest))
    report.problems.extend(_check_prior(folder, manifest))
    cache = _open(folder, manifest, fingerprint, report) if deep else None
    if cache is not None:
        report.problems.extend(_check_whole(cache))
    total = manifest.num_bytes * (2 if deep else 1)
    done = 0
    for shard in manifest.shards:
        sound = True
        for name, record in shard.objects.items():
            problem = _check_object(folder, record, f"shard {shard.index}, field {name}")
            if problem:
                sound = False
                report.problems.append(problem)
            report.num_objects += 1
            report.num_bytes += record.num_bytes
            done += record.num_bytes
            if report_progress:
                report_progress(done, total)
        if cache is not None and sound:
            report.problems.extend(_check_content(cache, shard))
        done += shard.num_bytes if deep else 0
        if report_progress:
            report_progress(done, total)
    return report


#: Members of the manifest that the plan does not have.
_MANIFEST_ONLY = ("shards", "tokenizer_files", "cache_files")


def _check_records(folder: Folder, manifest: Manifest) -> Iterator[str]:
    """Compare the manifest with the plan and the commit records, of which it must be the exact sum."""
    # As JSON, not as records: those leave out what they do not know, and fill in what is missing.
    found = json.loads(folder.read(layout.MANIFEST))
    yield from _check_record(folder, layout.MANIFEST, type(manifest), found)
    plan = {name: value for name, value in found.items() if name not in (*_MANIFEST_ONLY, layout.CHECKSUM)}
    yield from _check_record(folder, layout.PLAN, Plan, plan)
    for shard, record in zip(manifest.shards, found["shards"], strict=True):
        yield from _check_record(folder, layout.commit_name(shard.index), ShardRecord, record)
    missing = [name for name in _MANIFEST_ONLY if name not in found]
    if missing:
        yield f"file {layout.MANIFEST} has no {missing[0]}"


def _check_rewritable(folder: Folder, manifest: Manifest) -> Iterator[str]:
    """Check the table of the plan and the tokenizer, which the dump's own command can make again."""
    try:
        checked_plan_table(folder, manifest)
    except CorruptCacheError:
        yield f"file {layout.PLAN_TABLE} is missing or damaged (its sha256 is not the plan's)"
    head = [record for record in manifest.cache_files if record.path == layout.LM_HEAD]
    for record in (*manifest.tokenizer_files, *head):
        problem = _check_object(folder, record, f"file that {layout.MANIFEST} records")
        if problem:
            yield problem


def _unlisted(folder: Folder, manifest: Manifest) -> list[str]:
    """Return the files beside the tokenizer that no record names, where the store can be listed.

    Without hidden ones, which file managers leave behind and no loader of tokenizers reads.
    """
    recorded = {record.path for record in manifest.tokenizer_files}
    try:
        found = folder.names(layout.TOKENIZER)
    except (CacheError, OSError):  # reading needs no right to list
        return []
    unlisted = [name for name in found if name not in recorded and not name.endswith(TEMPORARY)]
    return [name for name in unlisted if not Path(name).name.startswith(".")]


def _check_prior(folder: Folder, manifest: Manifest) -> Iterator[str]:
    for record in manifest.cache_files:
        if record.path != layout.TAIL_PRIOR:
            continue
        problem = _check_object(folder, record, "tail prior")
        if problem:
            yield problem
            return
        try:
            read_prior(folder, manifest)
        except CorruptCacheError as error:
            yield str(error)


def _check_record(folder: Folder, name: str, model: type[Record], expected: Any) -> Iterator[str]:
    """Check that a record says what the manifest says, in the one form that is ever written (so every byte counts)."""
    if not folder.exists(name):
        yield f"file {name} is missing from {folder}"
        return
    try:
        data = folder.read(name)
        layout.from_json(model, data, f"{folder}/{name}")
    except CacheError as error:
        yield str(error)
        return
    values = json.loads(data)
    if layout.canonical_json(values) != data:
        yield f"file {name} is damaged: it is not the JSON that was written"
    elif values != expected:
        yield f"file {name} and {layout.MANIFEST} disagree: one of them was changed"


def _check_object(folder: Folder, record: ObjectRecord, where: str) -> str | None:
    try:
        data = layout.read_object(folder, record, where)
    except CorruptCacheError as error:
        return str(error)
    if layout.sha256(data) != record.sha256:
        return f"{where}: file {record.path} is damaged (its sha256 is not the recorded one)"
    return None


def _open(folder: Folder, manifest: Manifest, fingerprint: str, report: VerifyReport) -> Cache | None:
    """Open the cache for reading shard after shard; what forbids it, such as an unknown codec, is a problem."""
    try:
        return Cache(folder, manifest, fingerprint, max_open_shards=1)
    except KdcacheError as error:
        report.problems.append(str(error))
        return None


def _check_whole(cache: Cache) -> Iterator[str]:
    """Check what a cache has once: the table of the plan, and an LM head."""
    uses: list[Callable[[], object]] = [cache.plan_table]
    if cache.manifest.targets.kind == "hidden":
        uses.append(lambda: check_head(cache.lm_head_file(), cache.manifest))
    for use in uses:
        try:
            use()
        except KdcacheError as error:
            yield str(error).removeprefix(f"{cache.folder}, ")


def _check_content(cache: Cache, shard: ShardRecord) -> Iterator[str]:
    try:
        # The same problem in several pieces of the shard is one problem.
        yield from dict.fromkeys(_content_problems(cache, shard))
    except KdcacheError as error:
        yield str(error).removeprefix(f"{cache.folder}, ")


def _content_problems(cache: Cache, shard: ShardRecord) -> Iterator[str]:
    begin, end = int(cache.shard_starts[shard.index]), int(cache.shard_starts[shard.index + 1])
    table = load_table(cache.folder, shard, ("num_positions", "token_hash"), first_sequence=begin)
    lengths = np.asarray(table["num_positions"])
    step = max(1, int(_deep_positions(cache) // max(float(lengths.mean()), 1.0))) if len(lengths) else 1
    for first in range(begin, end, step):
        batch = cache.read(range(first, min(first + step, end)), fields=list(cache.fields))
        for name, kind in cache.fields.items():
            where = f"shard {shard.index}, field {name}, file {shard.objects[name].path}"
            yield from (f"{where}: {problem}" for problem in kind.check(batch))
            if name == TOKENS_FIELD:
                rows = table.slice(first - begin, step)
                yield from (f"{where}: {problem}" for problem in _check_hashes(batch, rows))
                yield from (f"{where}: {problem}" for problem in _check_lengths(batch, rows))


def _deep_positions(cache: Cache) -> int:
    """Return how many positions are decoded at once, with all fields of vectors as float32."""
    fields = [field for name, field in cache.fields.items() if name not in (TOKENS_FIELD, TARGETS_FIELD)]
    width = sum(math.prod(array.shape) for field in fields for array in field.record.arrays if array.rows != "table")
    return min(_DEEP_POSITIONS, _DEEP_STATES // max(width, 1))


def _check_lengths(batch: SequenceBatch, table: pa.Table) -> Iterator[str]:
    """Compare the lengths of the per-sequence table, by which batches are formed, with those of the tokens."""
    offsets = {"num_tokens": batch.token_offsets_N1, "num_positions": batch.position_offsets_N1}
    for name in offsets.keys() & set(table.column_names):
        found_N, stored_N = as_numpy(table[name]), np.diff(offsets[name])
        for row in np.flatnonzero(found_N != stored_N)[:1].tolist():
            yield (
                f"sequence {batch.indices[row]}: {name} of the per-sequence table is {found_N[row]}, of the tokens "
                f"{stored_N[row]}"
            )


def _check_hashes(batch: SequenceBatch, table: pa.Table) -> Iterator[str]:
    pieces = np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])
    for index, tokens, recorded in zip(batch.indices, pieces, table["token_hash"].to_pylist(), strict=True):
        if token_hash(tokens) != recorded:
            yield f"sequence {index}: tokens do not match the token_hash of the per-sequence table"
