"""List the files of a cache, or of a part of it (some fields, some shards) that becomes a cache of its own.

Objects of fields are copied as they are stored, without decoding. Tables and records that number shards or sequences
are written anew, because the numbers of a part start at 0. The provenance of a part names the cache that it comes from.
To select sequences or to change targets, use ``kdcache transcode``.

The tail prior is one mean over all shards, and the share of each shard is not stored. So a part gets the prior of the
whole cache, as it does when a transcoding selects sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.cache import layout
from kdcache.cache.lookup import read_plan_table, renumbered_plan, with_column
from kdcache.cache.sequence_table import load_table
from kdcache.cache.tail_prior import pack_prior, read_prior
from kdcache.errors import CacheError, CorruptCacheError, did_you_mean
from kdcache.fields import TARGETS_FIELD, TOKENS_FIELD
from kdcache.schema import Manifest, ObjectRecord, ShardRecord
from kdcache.storage.folder import Folder

#: Per-sequence tables that are read at once.
_TABLES = 8
#: More than any cache has.
_MOST_SHARDS = 10_000_000


@dataclass(frozen=True)
class Item:
    """One file: ``record`` describes it at the target, ``source`` is its path; ``data`` its bytes if it is new."""

    record: ObjectRecord
    source: str = ""
    data: bytes | None = None

    @property
    def is_unique(self) -> bool:
        """Whether the name identifies the content: names of a shard's objects contain a random attempt."""
        return self.data is None and self.record.path.startswith((layout.FIELDS, layout.SEQUENCES))


@dataclass(frozen=True)
class Contents:
    """A finished cache: its manifest, also as bytes, and every file that does not follow from the manifest."""

    manifest: Manifest
    manifest_data: bytes
    items: tuple[Item, ...]
    is_part: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest."""
        return layout.sha256(self.manifest_data)


def contents_of(source: Folder, fields: Sequence[str] | None = None, shards: Sequence[int] | None = None) -> Contents:
    """Return the contents of the finished cache in ``source``, or of the part with some ``fields`` and ``shards``.

    Every part includes tokens and targets, and for the kind hidden the last hidden state. Raises ``CacheError`` for
    unknown fields and shards, ``CorruptCacheError`` for files that cannot be read.
    """
    manifest, fingerprint = layout.read_manifest(source)
    kept_fields = _chosen_fields(manifest, fields, source)
    kept_shards = _chosen_shards(manifest, shards, source)
    if len(kept_fields) == len(manifest.fields) and len(kept_shards) == manifest.num_shards:
        items = (_table_item(source, manifest), *_file_items(manifest))
        return Contents(manifest, source.read(layout.MANIFEST, fingerprint), tuple(items))
    link = {"source": fingerprint, "fields": kept_fields, "shards": kept_shards}
    if len(kept_shards) == manifest.num_shards:
        return _with_fields(source, manifest, kept_fields, link)
    return _with_shards(source, manifest, kept_fields, kept_shards, link)


def parse_shards(text: str) -> list[int]:
    """Parse numbers of shards such as ``0-3,7``; return them ascending. Raises ``CacheError``."""
    numbers: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise CacheError(f"shards {text!r}: {piece.strip()!r} is neither a number nor a range such as 0-3")
        if int(last or first) >= _MOST_SHARDS:  # a typing mistake must not fill the memory
            raise CacheError(f"shards {text!r}: no cache has a shard {last or first}")
        numbers.update(range(int(first), int(last if dash else first) + 1))
    return sorted(numbers)


def _chosen_fields(manifest: Manifest, wanted: Sequence[str] | None, source: Folder) -> list[str]:
    held = [item.name for item in manifest.fields]
    if wanted is None:
        return held
    for name in wanted:
        if name not in held:
            raise CacheError(f"{source} has no field {name!r}; {did_you_mean(name, held)}")
    always = {TOKENS_FIELD, TARGETS_FIELD} | ({manifest.states_field} if manifest.targets.kind == "hidden" else set())
    return [name for name in held if name in always.union(wanted)]


def _chosen_shards(manifest: Manifest, wanted: Sequence[int] | None, source: Folder) -> list[int]:
    if wanted is None:
        return list(range(manifest.num_shards))
    chosen = sorted(set(wanted))
    if not chosen:
        raise CacheError(f"no shard of {source} was selected; name at least one of its {manifest.num_shards}")
    for shard in (chosen[0], chosen[-1]):
        if not 0 <= shard < manifest.num_shards:
            raise CacheError(f"{source} has no shard {shard}; its shards are 0 to {manifest.num_shards - 1}")
    return chosen


def _table_item(source: Folder, manifest: Manifest) -> Item:
    size = source.size(layout.PLAN_TABLE)
    if size is None:
        raise CorruptCacheError(
            f"file {layout.PLAN_TABLE} is missing from {source}; run the command that made the cache again, which "
            "writes the file again"
        )
    if size > layout.MAX_TABLE_BYTES:
        raise CorruptCacheError(f"file {layout.PLAN_TABLE} of {source} has {size:,} bytes, which no such table has")
    record = ObjectRecord(path=layout.PLAN_TABLE, num_bytes=size, sha256=manifest.table_sha256)
    return Item(record, layout.PLAN_TABLE)


def _file_items(manifest: Manifest) -> list[Item]:
    objects = [record for shard in manifest.shards for record in shard.objects.values()]
    return [Item(record, record.path) for record in (*manifest.tokenizer_files, *manifest.cache_files, *objects)]


def _with_fields(source: Folder, manifest: Manifest, fields: list[str], link: dict[str, Any]) -> Contents:
    names = {*fields, layout.SEQUENCES_FIELD}
    shards = [
        shard.model_copy(update={"objects": {name: shard.objects[name] for name in shard.objects if name in names}})
        for shard in manifest.shards
    ]
    part = _rewritten(manifest, link, shards=tuple(shards), fields=tuple(manifest.field(name) for name in fields))
    return _as_contents(part, (_table_item(source, manifest), *_file_items(part)))


def _with_shards(
    source: Folder, manifest: Manifest, fields: list[str], numbers: list[int], link: dict[str, Any]
) -> Contents:
    chosen = [manifest.shards[number] for number in numbers]
    counts = np.array([shard.num_sequences for shard in chosen])
    starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    shards, items = [], []
    with ThreadPoolExecutor(_TABLES) as pool:
        tables = pool.map(lambda pair: _renumbered_table(source, *pair), zip(chosen, starts, strict=False))
        for index, (shard, data) in enumerate(zip(chosen, tables, strict=True)):
            record, files = _renumbered(shard, index, fields, data)
            shards.append(record)
            items.extend(files)
    table = _made(layout.PLAN_TABLE, layout.table_to_parquet(_plan_table(source, manifest, numbers, starts)))
    cache_files = [_cache_file(source, manifest, record, chosen) for record in manifest.cache_files]
    part = _rewritten(
        manifest,
        link,
        shards=tuple(shards),
        fields=tuple(manifest.field(name) for name in fields),
        cache_files=tuple(item.record for item in cache_files),
        table_sha256=table.record.sha256,
        num_shards=len(shards),
        **{name: sum(getattr(s, name) for s in chosen) for name in ("num_sequences", "num_positions", "num_tokens")},
    )
    tokenizer = [Item(record, record.path) for record in manifest.tokenizer_files]
    return _as_contents(part, (table, *tokenizer, *cache_files, *items))


def _renumbered(shard: ShardRecord, index: int, fields: list[str], table: bytes) -> tuple[ShardRecord, list[Item]]:
    """Return the record of ``shard`` as number ``index`` and its files, with the new per-sequence ``table``."""
    name = layout.object_name(layout.SEQUENCES_FIELD, index, shard.attempt)
    items = {layout.SEQUENCES_FIELD: _made(name, table)}
    for field in fields:
        before = shard.objects[field]
        path = layout.object_name(field, index, shard.attempt)
        items[field] = Item(before.model_copy(update={"path": path}), before.path)
    objects = {field: item.record for field, item in items.items()}
    return shard.model_copy(update={"index": index, "objects": objects}), list(items.values())


def _renumbered_table(source: Folder, shard: ShardRecord, start: int) -> bytes:
    table = load_table(source, shard)
    return layout.table_to_ipc(with_column(table, "sequence", start + np.arange(table.num_rows)))


def _plan_table(source: Folder, manifest: Manifest, numbers: list[int], starts: list[int]) -> pa.Table:
    """Return the table of plan.parquet for the sequences of some shards, numbered from 0."""
    before = np.concatenate([[0], np.cumsum([shard.num_sequences for shard in manifest.shards])])
    chosen_N = np.concatenate([np.arange(before[number], before[number + 1]) for number in numbers])
    return renumbered_plan(read_plan_table(source, manifest), chosen_N, np.asarray(starts), manifest.num_sequences)


def _cache_file(source: Folder, manifest: Manifest, record: ObjectRecord, chosen: list[ShardRecord]) -> Item:
    if record.path != layout.TAIL_PRIOR:
        return Item(record, record.path)
    prior_V = read_prior(source, manifest)
    counts = {index: shard.num_positions for index, shard in enumerate(chosen)}
    return _made(layout.TAIL_PRIOR, pack_prior(prior_V, counts))


def _made(path: str, data: bytes) -> Item:
    return Item(ObjectRecord(path=path, num_bytes=len(data), sha256=layout.sha256(data)), data=data)


def _rewritten(manifest: Manifest, link: dict[str, Any], **changes: Any) -> Manifest:
    before = manifest.provenance.get("part_of")
    chain = [*before, link] if isinstance(before, list) else [link]
    values = {name: getattr(manifest, name) for name in Manifest.model_fields}
    return Manifest(**{**values, **changes, "provenance": {**manifest.provenance, "part_of": chain}})


def _as_contents(part: Manifest, items: tuple[Item, ...]) -> Contents:
    return Contents(part, layout.manifest_json(part), items, is_part=True)
