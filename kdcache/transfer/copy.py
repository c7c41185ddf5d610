"""Copy a finished cache, or a part of it, between folders and stores: ``kdcache push`` and ``kdcache pull``.

Both are one function, whichever side is remote. The plan is written first, to mark the target; the manifest is written
last, so that an incomplete copy is never taken for a cache. Files that exist at the target are kept: local files are
compared by hash, objects of shards by name and size, because their names contain a random attempt that identifies the
content. Every file is checked against its hash before it is written.

Files are copied whole, several at once, limited to `IN_FLIGHT_BYTES` of memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from kdcache.cache import layout
from kdcache.cache.output_dir import refuse_foreign
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, CorruptCacheError, IncompleteCacheError
from kdcache.progress import bar
from kdcache.schema import Plan
from kdcache.storage.download import file_sha256
from kdcache.storage.folder import Folder, check_no_overlap
from kdcache.transfer.part import Contents, Item, contents_of
from kdcache.words import are, count

#: Most bytes of files in memory at once (a larger file is copied alone).
IN_FLIGHT_BYTES = 2 << 30


@dataclass
class TransferResult:
    """Result of a transfer, or, with ``dry_run``, what it would do."""

    source: str
    target: str
    fingerprint: str
    is_part: bool
    num_shards: int
    num_files: int
    num_bytes: int
    num_files_moved: int
    num_bytes_moved: int
    elapsed_s: float
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def copy_cache(
    source: str,
    target: str,
    *,
    fields: Sequence[str] | None = None,
    shards: Sequence[int] | None = None,
    jobs: int = 8,
    check: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> TransferResult:
    """Copy the finished cache at ``source`` to ``target`` (local paths or URLs), or resume an interrupted copy.

    ``fields`` and ``shards`` select a part, which becomes a cache of its own. ``check`` also reads files again that are
    otherwise trusted by name and size. Raises ``CacheError`` for a target with other content and for files that cannot
    be read or written, ``ConfigError`` for a target that overlaps the source, and ``CorruptCacheError`` for a source
    whose bytes are not the recorded ones.
    """
    began = time.perf_counter()
    source_folder, target_folder = Folder(source), Folder(target)
    check_no_overlap(source_folder, target_folder)
    contents = contents_of(source_folder, fields, shards)
    _check_target(target_folder, contents)
    mover = _Mover(source_folder, target_folder, jobs, progress)
    if dry_run:
        missing = mover.missing(contents, check)
    else:
        with CacheWriter(target_folder) as writer:
            _check_target(target_folder, contents)  # again, now that no other process writes
            missing = _move(contents, mover, writer, check)
    return TransferResult(
        source=source,
        target=target,
        fingerprint=contents.fingerprint,
        is_part=contents.is_part,
        num_shards=contents.manifest.num_shards,
        num_files=len(contents.items),
        num_bytes=_bytes_of(contents.items),
        num_files_moved=len(missing),
        num_bytes_moved=_bytes_of(missing),
        elapsed_s=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _move(contents: Contents, mover: _Mover, writer: CacheWriter, check: bool) -> list[Item]:
    """Copy everything to the writer's folder, the manifest last; return the files that were missing there."""
    target = writer.folder
    missing = mover.missing(contents, check)
    if missing:  # a manifest must not outlive its shards
        target.remove(layout.MANIFEST)
    mover.write_records({layout.PLAN: layout.to_json(contents.manifest.plan)})
    writer.remove_garbage(contents.manifest, {shard.index: shard for shard in contents.manifest.shards})
    mover.move(missing)
    if check:
        wrong = mover.missing(contents, check)
        if wrong:
            raise CorruptCacheError(
                f"{target}: {count(len(wrong), 'file')} {are(len(wrong))} not what was written, the first is "
                f"{wrong[0].record.path}; run the same command again, which writes them again"
            )
    writer.check_right()
    mover.write_records({layout.commit_name(s.index): layout.to_json(s) for s in contents.manifest.shards})
    writer.check_right()
    mover.write_records({layout.MANIFEST: contents.manifest_data})
    return missing


class _Mover:
    """Moves files from one folder to another, ``jobs`` at a time."""

    def __init__(self, source: Folder, target: Folder, jobs: int, progress: bool) -> None:
        self.source, self.target, self._jobs, self._progress = source, target, jobs, progress
        self._memory = _Memory(IN_FLIGHT_BYTES)

    def missing(self, contents: Contents, check: bool) -> list[Item]:
        """Return the files that are missing at the target or differ there."""
        found: list[Item] = []
        items = contents.items

        def look(item: Item) -> None:
            if not self._is_there(item, check):
                found.append(item)

        self._all(look, items, "compare")
        order = {item.record.path: index for index, item in enumerate(items)}
        return sorted(found, key=lambda item: order[item.record.path])

    def move(self, items: Sequence[Item]) -> None:
        """Read, check and write every file."""
        self._all(self._move_one, items, "move")

    def write_records(self, records: Mapping[str, bytes]) -> None:
        """Write JSON records by name, except those that are equal at the target."""
        with ThreadPoolExecutor(self._jobs) as pool:
            list(pool.map(self._write_record, records.items()))

    def _write_record(self, pair: tuple[str, bytes]) -> None:
        name, data = pair
        if self.target.size(name) == len(data) and self.target.read(name, max_bytes=len(data)) == data:
            return
        self.target.write(name, data)

    def _all(self, work: Callable[[Item], None], items: Sequence[Item], title: str) -> None:
        with bar(_bytes_of(items), title, "B", enabled=self._progress and bool(items)) as meter:
            pool = ThreadPoolExecutor(self._jobs, thread_name_prefix=f"kdcache-{title}")
            try:
                futures = {pool.submit(work, item): item for item in items}
                for future in as_completed(futures):
                    future.result()
                    meter.update(futures[future].record.num_bytes)
            finally:  # after the first failure no further file is started
                pool.shutdown(cancel_futures=True)

    def _is_there(self, item: Item, check: bool) -> bool:
        record = item.record
        if self.target.size(record.path) != record.num_bytes:
            return False
        if self.target.local_path is not None:
            return file_sha256(self.target.local_file(record.path)) == record.sha256
        if item.is_unique and not check:
            return True
        with self._memory.hold(record.num_bytes):
            data = self.target.read(record.path, max_bytes=record.num_bytes)
            return layout.sha256(data) == record.sha256

    def _move_one(self, item: Item) -> None:
        with self._memory.hold(item.record.num_bytes):
            data = item.data if item.data is not None else self._read(item)
            self.target.write(item.record.path, data)

    def _read(self, item: Item) -> bytes:
        try:
            return self.source.read(item.source, item.record.sha256, max_bytes=item.record.num_bytes)
        except FileNotFoundError:
            what = f"file {item.source} is missing from {self.source}"
        except CorruptCacheError as error:
            what = str(error)
        raise CorruptCacheError(f"{what}; kdcache verify lists all such files")


class _Memory:
    """Limits the bytes that are held at once; a request above the limit waits until it is alone."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._held = num_bytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        wanted = min(num_bytes, self._num_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._held + wanted <= self._num_bytes)
            self._held += wanted
        try:
            yield
        finally:
            with self._changed:
                self._held -= wanted
                self._changed.notify_all()


def _check_target(target: Folder, contents: Contents) -> None:
    """Raise ``CacheError`` for a target with another cache, another unfinished cache, or other files."""
    try:
        standing = layout.read_manifest(target)[1]
    except (CorruptCacheError, IncompleteCacheError):
        standing = None  # decided by the plan
    except CacheError:
        refuse_foreign(target)
        return
    if standing == contents.fingerprint:
        return
    found = f"a cache with the fingerprint {standing[:16]}" if standing else "another unfinished cache"
    if standing or _plan_of(target) != contents.manifest.plan:
        raise CacheError(
            f"{target} holds {found}, and the cache to copy has the fingerprint {contents.fingerprint[:16]}; choose "
            "another target"
        )


def _plan_of(target: Folder) -> Plan | None:
    try:
        return layout.read_plan(target)
    except CorruptCacheError:
        return None


def _bytes_of(items: Sequence[Item]) -> int:
    return sum(item.record.num_bytes for item in items)
