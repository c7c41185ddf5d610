"""Writing a cache: plan first, shards in any order, commit records last, manifest at the very end.

A shard is its objects plus a commit record that is written after them. Killing the process at any instant therefore
loses at most the shards in flight; files without a record are garbage, which the next writer removes. A
committed shard is never touched again. The lock makes a second process on the same output fail at once; it belongs
to the operating system, so it ends with a killed process. On an object store a lease replaces it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdcache.cache import layout
from kdcache.cache.output_dir import LOCK, check_same_plan, differences_of, refuse_foreign
from kdcache.cache.shard_data import ShardData, encode_field, statistics_of, with_statistics
from kdcache.cache.shard_file import pack
from kdcache.cache.tail_prior import TailPrior
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.fields import field_of
from kdcache.schema import FieldRecord, Manifest, ObjectRecord, Plan, ShardRecord
from kdcache.schema.names import is_name
from kdcache.storage.folder import TEMPORARY, Folder
from kdcache.storage.lease import WATCH_S, Lease
from kdcache.words import are, count

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger(__name__)

#: Shards that are looked for at once.
_QUESTIONS = 8


class CacheWriter:
    """The one process that may write to ``folder``; use it as a context manager, it holds the lock or the lease.

    ``watch_s`` is for how many seconds a lease of another writer is watched, on a folder that is not local.
    """

    def __init__(self, folder: Folder, *, watch_s: float = WATCH_S) -> None:
        self.folder = folder
        self.plan: Plan | None = None
        self._tail_prior: TailPrior | None = None
        self._lock: FileLock | None = None
        self._lease = Lease(folder, watch_s=watch_s) if folder.local_path is None else None

    def __enter__(self) -> CacheWriter:
        local = self.folder.local_path
        refuse_foreign(self.folder)  # before the lock: nothing is written into what is not ours
        if self._lease is not None:
            self._lease.acquire()
        if local is not None:
            from filelock import FileLock, Timeout  # imports asyncio, which readers do not need

            try:
                local.mkdir(parents=True, exist_ok=True)
                if (local / LOCK).is_symlink():  # opened, it would change a file elsewhere
                    raise CacheError(f"{local / LOCK} is a link; remove it, or choose another output")
                self._lock = FileLock(local / LOCK)
                self._lock.acquire(timeout=0)
            except Timeout:
                raise CacheError(
                    f"another process is writing to {local}; wait for it or choose another output"
                ) from None
            except OSError as error:
                raise CacheError(f"cannot write to output {local}: {error.strerror or error}") from None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._lease is not None:
            self._lease.release()

    def check_right(self) -> None:
        """Raise ``CacheError`` when another process has taken over the writing; called before anything is committed."""
        if self._lease is not None:
            self._lease.check()

    def begin(
        self,
        plan: Plan,
        table: pa.Table,
        tokenizer_files: Mapping[str, bytes],
        cache_files: Mapping[str, bytes] | None = None,
    ) -> list[int]:
        """Start the planned cache or resume it; return the shards that are not committed.

        ``cache_files`` are those that the cache has once and that are known before any shard (the LM head), by name.
        Raises ``CacheError`` when the folder holds another cache (saying what differs) or something else entirely.
        """
        files = {f"{layout.TOKENIZER}/{name}": data for name, data in tokenizer_files.items()}
        files |= cache_files or {}
        existing = layout.read_plan(self.folder)
        if existing is not None and not self._has_commits() and differences_of(existing, plan):
            # A dump that failed before its first shard (NaN, out of memory) must not forbid another attempt. Its plan
            # stands until the new one is written over it: without a plan, this would look like a foreign folder.
            self.remove_garbage(existing, {})
            existing = None
        if existing is None:
            self._start(plan, table, files)
            existing = plan
        else:
            check_same_plan(existing, plan, self.folder)
            self._restore(existing, table, files)
        self.plan = existing
        committed = self._committed()
        if existing.targets.tail_prior:
            self._tail_prior = TailPrior(self.folder, existing.tokenizer.vocab_size, committed)
        missing = [shard for shard in range(existing.num_shards) if shard not in committed]
        if missing:  # a manifest must not outlive its shards: its presence means that the cache is complete
            self.folder.remove(layout.MANIFEST)
        self.remove_garbage(existing, committed)
        return missing

    def _has_commits(self) -> bool:
        return any(not name.endswith(TEMPORARY) for name in self.folder.names(layout.COMMITS))

    def _start(self, plan: Plan, table: pa.Table, files: Mapping[str, bytes]) -> None:
        refuse_foreign(self.folder)
        # Of a start that was killed, perhaps with another teacher.
        for name in (*self.folder.names(layout.TOKENIZER), layout.LM_HEAD, layout.TAIL_PRIOR):
            self.folder.remove(name)
        for name, data in files.items():
            self.folder.write(name, data)
        self.folder.write(layout.PLAN_TABLE, layout.table_to_parquet(table))
        self.folder.write(layout.PLAN, layout.to_json(plan))

    def _restore(self, plan: Plan, table: pa.Table, files: Mapping[str, bytes]) -> None:
        """Write again the files that are missing or damaged, if these are the recorded bytes."""
        wanted = {layout.PLAN_TABLE: (layout.table_to_parquet(table), plan.table_sha256)}
        manifest = _standing_manifest(self.folder)
        records = (*manifest.tokenizer_files, *manifest.cache_files) if manifest else ()
        recorded = {record.path: record.sha256 for record in records}
        for name, data in files.items():
            wanted[name] = (data, recorded.get(name, layout.sha256(data)))
        for name, (data, digest) in wanted.items():
            if self.folder.exists(name) and _sha256_of(self.folder, name) == digest:
                continue
            if layout.sha256(data) == digest:
                self.folder.write(name, data)
            else:
                log.warning("%s/%s is damaged, and other versions of the libraries made it", self.folder, name)

    def _committed(self) -> dict[int, ShardRecord]:
        assert self.plan is not None
        # Several at once: of each an object store is asked a handful of questions. A disk answers at once.
        with ThreadPoolExecutor(1 if self.folder.local_path is not None else _QUESTIONS) as pool:
            found = pool.map(self._committed_shard, range(self.plan.num_shards))
            return {record.index: record for record in found if record is not None}

    def _committed_shard(self, shard: int) -> ShardRecord | None:
        try:
            record = layout.read_commit(self.folder, shard)
        except CorruptCacheError as error:
            log.warning("%s; shard %d is made again", error, shard)
            return None
        if record is None:
            return None
        if record.index != shard:
            log.warning("%s is the record of shard %d; it is made again", layout.commit_name(shard), record.index)
            return None
        if any(self.folder.size(item.path) != item.num_bytes for item in record.objects.values()):
            log.warning("files of shard %d are missing or cut short; it is made again", shard)
            return None
        return record

    def remove_garbage(self, plan: Plan, committed: Mapping[int, ShardRecord]) -> None:
        """Remove the objects that no record of ``committed`` names, and files that were never finished."""
        kept = {item.path for record in committed.values() for item in record.objects.values()}
        for directory in layout.object_directories(plan):
            for name in self.folder.names(directory):
                if name not in kept and layout.is_object_name(name):
                    self.folder.remove(name)
        for directory in ("", layout.COMMITS, layout.TOKENIZER):
            for name in self.folder.names(directory):
                if name.endswith(TEMPORARY):
                    self.folder.remove(name)

    def write_shard(self, data: ShardData) -> ShardRecord:
        """Encode, write and commit one shard; safe to call from another thread than the teacher's."""
        assert self.plan is not None
        attempt = secrets.token_hex(4)
        objects: dict[str, ObjectRecord] = {}
        tokens = data.tokens
        num_rows = {axis: len(rows) for axis, rows in (("tokens", tokens.tokens_T), ("positions", tokens.loss_mask_P))}
        for item in self.plan.fields:
            name = layout.object_name(item.name, data.index, attempt)
            arrays = encode_field(field_of(item, self.plan), data)
            _count_rows(num_rows, item, arrays)
            objects[item.name] = layout.write_object(self.folder, name, pack(arrays))
        name = layout.object_name(layout.SEQUENCES_FIELD, data.index, attempt)
        table = layout.table_to_ipc(with_statistics(data))
        objects[layout.SEQUENCES_FIELD] = layout.write_object(self.folder, name, table)
        record = ShardRecord(
            index=data.index,
            attempt=attempt,
            num_rows=num_rows,
            objects=objects,
            statistics=statistics_of(data),
        )
        self.check_right()
        if self._tail_prior is not None:
            # Before the record: what a shard adds is never missing, and a shard that is made again adds nothing.
            self._tail_prior.add(data.index, data.tail_sum)
        self.folder.write(layout.commit_name(data.index), layout.to_json(record))
        return record

    def finalise(self) -> Manifest:
        """Write the manifest from the plan and the commit records, unless it stands already; refuses holes."""
        manifest = build_manifest(self.folder)
        self._refuse_lost(manifest)
        self.check_right()
        standing = _standing_manifest(self.folder)
        # Files that a cache has once are recorded once: later versions of them must not become the truth.
        once = {"tokenizer_files": manifest.tokenizer_files, "cache_files": manifest.cache_files}
        if standing and standing.model_copy(update=once) == manifest:
            return standing
        self.folder.write(layout.MANIFEST, layout.manifest_json(manifest))
        return manifest

    def _refuse_lost(self, manifest: Manifest) -> None:
        """Refuse commit records whose files are gone: of a writer that was taken over while it committed."""
        if self._lease is None:
            return
        there = {name for directory in layout.object_directories(manifest) for name in self.folder.names(directory)}
        for shard in manifest.shards:
            lost = sorted({item.path for item in shard.objects.values()} - there)
            if lost:
                raise CacheError(
                    f"{self.folder} cannot be finished: file {lost[0]} of shard {shard.index} is missing; run the "
                    "command again, which makes that shard again"
                )


def _count_rows(num_rows: dict[str, int], field: FieldRecord, arrays: Mapping[str, Any]) -> None:
    """Add the axes of ``field`` to ``num_rows``; raises ``CacheError`` where its arrays have another number of rows."""
    for array in field.arrays:
        if array.rows == "table":
            continue
        found = len(arrays[array.path])
        if num_rows.setdefault(array.rows, found) != found:
            raise CacheError(
                f"field {field.name}, array {array.name}: {found} rows, other arrays have {num_rows[array.rows]} "
                f"{array.rows}"
            )


def build_manifest(folder: Folder) -> Manifest:
    """Return the manifest that the plan and the commit records of ``folder`` make (it is never anything more)."""
    plan = layout.read_plan(folder)
    if plan is None:
        raise CacheError(f"there is no plan in {folder}")
    shards = [layout.read_commit(folder, shard) for shard in range(plan.num_shards)]
    holes = [index for index, shard in enumerate(shards) if shard is None]
    if holes:
        raise CacheError(
            f"{folder} cannot be finished: {count(len(holes), 'shard')} {are(len(holes))} missing, the first is "
            f"{holes[0]}"
        )
    # File managers, locks and people leave other files there.
    tokenizer = [name for name in folder.names(layout.TOKENIZER) if is_name(name.rpartition("/")[2])]
    return Manifest(
        **plan.model_dump(),
        shards=tuple(shard for shard in shards if shard is not None),
        tokenizer_files=tuple(_record_of(folder, name) for name in tokenizer),
        cache_files=tuple(_record_of(folder, name) for name in sorted(layout.cache_file_names(plan))),
    )


def _most_bytes(name: str) -> int:
    """Return the bound of a file that a cache has once, while no record says its size."""
    return layout.MAX_HEAD_BYTES if name == layout.LM_HEAD else layout.MAX_TABLE_BYTES


def _sha256_of(folder: Folder, name: str) -> str:
    try:
        return layout.sha256(folder.read(name, max_bytes=_most_bytes(name)))
    except CorruptCacheError:  # larger than anything that belongs there
        return ""


def _record_of(folder: Folder, name: str) -> ObjectRecord:
    try:
        data = folder.read(name, max_bytes=_most_bytes(name))
    except FileNotFoundError:
        raise CacheError(f"{folder} cannot be finished: {name} is missing; dump it again into another output") from None
    return ObjectRecord(path=name, num_bytes=len(data), sha256=layout.sha256(data))


def _standing_manifest(folder: Folder) -> Manifest | None:
    """Return the manifest in ``folder``, None when there is none or it is damaged."""
    try:
        return layout.read_manifest(folder)[0] if folder.exists(layout.MANIFEST) else None
    except CorruptCacheError as error:
        log.warning("%s; it is written again", error)
        return None
