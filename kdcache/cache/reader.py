"""Read a cache: any sequences, in any order, decoded on demand.

A shard is read whole (one request). Its arrays are unpacked and stay *encoded* in memory, and only the positions that a
batch asks for are decoded, so memory is bounded by a few encoded shards. Lookup is by sequence number, so results do
not depend on the order of reading.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.batches import Batches, MicroBatches
from kdcache.cache.decoder import BatchDecoder
from kdcache.cache.fields import encoded_bytes, field_named, open_fields
from kdcache.cache.gather import Piece, join, runs_of
from kdcache.cache.limits import decoded_limit
from kdcache.cache.open_shards import OpenShards
from kdcache.cache.order import NUM_STREAMS, Order, SequentialOrder, ShuffledOrder
from kdcache.cache.prefetch import Prefetcher
from kdcache.cache.private_copy import private_copy
from kdcache.cache.shards import FieldArrays, ShardArrays
from kdcache.cache.tail_prior import read_prior
from kdcache.cache.truncate import cut_targets, with_top_k
from kdcache.errors import CacheError
from kdcache.fields import TOKENS_FIELD, FieldKind
from kdcache.fields.vectors import LAST_STATE
from kdcache.schema import Manifest, ObjectRecord, SequenceBatch
from kdcache.storage.folder import Folder
from kdcache.storage.local_store import LocalStore, LocalStoreConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from kdcache.cache.lookup import PlanTable
    from kdcache.cache.sequence_table import SequenceTable

# Modules that need pyarrow are imported on use, because importing pyarrow's parts takes a third of `kdcache inspect`.

#: Encoded shards that stay in memory take at most this much together (but one always stays).
OPEN_BYTES = 2 << 30


class Cache:
    """A finished cache, open for reading. Make one with `open_cache`.

    Use it as a context manager, or call `close`, to free its memory and stop its downloads::

        with open_cache("cache") as cache:
            batch = cache.read([0, 1, 2])
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        fingerprint: str,
        max_open_shards: int = 8,
        *,
        check_crc: bool = True,
        max_decoded_bytes: int | str | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = fingerprint
        self.fields: Mapping[str, FieldKind] = open_fields(folder, manifest)
        self._most_bytes = decoded_limit(max_decoded_bytes)
        self._decoder = BatchDecoder(folder, manifest, self.fields, self._most_bytes)
        # Without a reference to this object, so that its shards are freed together with it.
        load = partial(_load, self._decoder, check_crc)
        self._shards = OpenShards(load, max_open_shards, OPEN_BYTES)
        self._last = {LAST_STATE: manifest.states_field} if manifest.targets.kind == "hidden" else {}
        # By name in a batch; the tokens are a batch themselves.
        own = {name: name for name, field in self.fields.items() if field.is_always_read and name != TOKENS_FIELD}
        self._always = own | self._last
        self._prefetcher: Prefetcher | None = None
        if isinstance(folder.store, LocalStore):
            self._prefetcher = Prefetcher(folder.store, folder, manifest)
            weakref.finalize(self, self._prefetcher.close)
        self._field_bytes = encoded_bytes(manifest)  # once, because every read asks and there may be many shards
        counts = [shard.num_sequences for shard in manifest.shards]
        self.shard_starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._is_closed = False

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop downloading and free all memory; reading afterwards raises ``CacheError``."""
        self._is_closed = True
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._shards.clear()
        for name in ("_sequences", "_plan"):  # those that were used
            self.__dict__.pop(name, None)

    def __len__(self) -> int:
        return self.manifest.num_sequences

    def __getitem__(self, index: int) -> SequenceBatch:
        """Read one sequence as a batch; negative numbers count from the end."""
        # IndexError ends Python's iteration by index.
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no sequence {index}; {self.folder} has {len(self)} (0 to {len(self) - 1})")
        return self.read([index % len(self)])

    @property
    def max_open_shards(self) -> int:
        """Most encoded shards that stay in memory; may be changed at any time."""
        return self._shards.max_shards

    @max_open_shards.setter
    def max_open_shards(self, number: int) -> None:
        self._shards.max_shards = number

    @property
    def vocab_size(self) -> int:
        """True vocabulary size of the teacher's tokenizer."""
        return self.manifest.tokenizer.vocab_size

    @cached_property
    def lengths_N(self) -> NDArray[np.int64]:
        """Positions of every sequence, [N]."""
        from kdcache.cache.columns import as_numpy

        return as_numpy(self.sequence_table(["num_positions"])["num_positions"]).astype(np.int64)

    @cached_property
    def sizes_N(self) -> NDArray[np.int64]:
        """About how many tokens of every sequence a model reads, [N]: the cost of a batch."""
        from kdcache.cache.lookup import num_tokens_of

        return np.maximum(num_tokens_of(self.sequences) - 1, 1)

    @cached_property
    def order_key(self) -> str:
        """Hash of what the order of an epoch depends on: the texts, how they were cut, and into which shards.

        It does not depend on the targets. So students of two caches of the same texts see the same batches, and
        differences between them come from the targets alone.
        """
        manifest = self.manifest
        identity = [manifest.corpus.fingerprint, manifest.tokenizer.sha256, manifest.sequences]
        return layout.sha256(layout.canonical_json([*identity, self.shard_starts.tolist()]))

    def shard_of(self, index: int) -> int:
        """Return the shard that holds sequence ``index``."""
        if not 0 <= index < len(self):
            raise CacheError(f"there is no sequence {index}; {self.folder} has {len(self)} (0 to {len(self) - 1})")
        return int(np.searchsorted(self.shard_starts, index, side="right")) - 1

    @property
    def sequences(self) -> SequenceTable:
        """The per-sequence table, column by column: each is read when it is first used, and stays."""
        self._check_open()
        return self._sequences

    def sequence_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the per-sequence table, or some columns of it: ids, documents, lengths, teacher loss, metadata.

        Columns that are read stay in memory until the cache is closed.
        """
        return self.sequences.table(columns)

    def plan_table(self) -> pa.Table:
        """Return the table of ``plan.parquet``: one row for every piece of a document in a sequence."""
        self._check_open()
        return self._plan.table()

    def where(self, condition: str) -> NDArray[np.int64]:
        """Return the sequences for which a filter on the per-sequence table is true, ascending, [N].

        Raises ``ConfigError`` for an invalid filter, and when it selects nothing (see `kdcache.cache.filters`).
        """
        from kdcache.cache.filters import columns_of, select_sequences

        self.sequences.load(columns_of(condition))
        return select_sequences(self.sequences, condition)

    def find(self, *, document: str | None = None, sequence: str | None = None) -> NDArray[np.int64]:
        """Return the sequences that hold a part of the document with this id, or that have this sequence id, [N].

        Raises ``CacheError`` when there is none, ``TypeError`` unless exactly one of the two is given.
        """
        self._check_open()
        if (document is None) == (sequence is None):
            raise TypeError("find() takes either document= or sequence=")
        column, value = ("document_id", document) if document is not None else ("sequence_id", sequence)
        from kdcache.cache.lookup import sequences_with

        return sequences_with(self._plan, column, str(value), str(self.folder))

    def tokenizer_json(self) -> str:
        """Return the teacher's tokenizer.json, for the ``tokenizers`` library."""
        files = self._tokenizer_files()
        if "tokenizer.json" not in files:
            raise CacheError(f"{self.folder} has no tokenizer.json, because its tokenizer has no fast version")
        return files["tokenizer.json"].decode()

    def tokenizer_dir(self) -> Path:
        """Return a local directory with the teacher's tokenizer files; it is removed when the process ends.

        It holds copies of the files that the manifest records, checked against their hashes, and nothing else: loaders
        read whatever lies in the directory that they are given.
        """
        return private_copy(self._tokenizer_files(), "kdcache-tokenizer-")

    def _tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer's files by name, checked against their hashes."""
        records = self.manifest.tokenizer_files
        return {Path(record.path).name: self._checked_file(record, "tokenizer") for record in records}

    def _checked_file(self, record: ObjectRecord, where: str) -> bytes:
        self._check_open()
        return layout.checked_object(self.folder, record, f"{self.folder}, {where}")

    @cached_property
    def tail_prior_V(self) -> NDArray[np.float32] | None:
        """Mean probability of every id at the positions where it is in the tail, [V]; None if it is not stored."""
        if not self.manifest.targets.tail_prior:
            return None
        return read_prior(self.folder, self.manifest)

    def lm_head_file(self) -> bytes:
        """Return the teacher's LM head as safetensors bytes; only targets of the kind hidden have one."""
        record = next((item for item in self.manifest.cache_files if item.path == layout.LM_HEAD), None)
        if record is None:
            raise CacheError(f"{self.folder} has no LM head; only targets of the kind hidden have one")
        return self._checked_file(record, "the teacher's LM head")

    def read(self, indices: Iterable[int], *, fields: Iterable[str] = (), top_k: int | None = None) -> SequenceBatch:
        """Read and decode sequences ``indices`` (any order, repeats allowed), and these further ``fields``.

        Targets of the kind hidden always include the last hidden state, from which the distribution is computed, as
        ``last``. In other caches ``last`` names the state of the last layer, where it is stored. With
        ``top_k`` only that many ids are kept at every position, and the mass of the others is added to the tail,
        exactly. The tail prior of the cache remains that of the stored K; ``kdcache transcode`` makes a cache with the
        prior of a smaller K. Raises ``CacheError`` for unknown sequences and fields, for a ``top_k`` above the stored
        one, and for a ``top_k`` of targets that include samples.
        """
        self._check_open()
        wanted = [int(index) for index in indices]
        named = {name: self._stored_as(name) for name in fields}
        for name in named.values():
            field_named(self.fields, self.manifest, name)
        names = tuple(named.values())
        held = self.manifest.targets
        kept = held if top_k is None else with_top_k(held, top_k, str(self.folder))
        if not wanted:
            raise CacheError("no sequences to read: indices is empty")
        values = self._always | {name: field for name, field in named.items() if field != TOKENS_FIELD}
        batch = join([self._decoder.decode(pieces, values) for pieces in self._groups(wanted, names)])
        batch.indices = wanted
        if kept != held:
            batch.targets, _ = cut_targets(batch.targets, held, kept)
        return batch

    def batches(
        self,
        batch_sequences: int = 8,
        *,
        shuffle: bool = True,
        seed: int = 0,
        where: str | None = None,
        fields: Sequence[str] = (),
        top_k: int | None = None,
        shuffle_window: int = 1,
        num_streams: int = NUM_STREAMS,
        rank: int = 0,
        num_ranks: int = 1,
        threads: int = 1,
        ahead: int = 2,
    ) -> Batches[SequenceBatch]:
        """Return this rank's decoded batches, one epoch each time they are iterated.

        ``threads`` threads read up to ``ahead`` batches in advance. A step of all ranks is ``batch_sequences x
        num_ranks`` sequences, the same ones however they are split. The order is that of training with the same
        ``seed`` (`epoch_order` explains windows and streams), or, without ``shuffle``, the stored one. ``where``
        filters by the per-sequence table; ``fields`` and ``top_k`` are those of `read`.
        """
        chosen_N = None if where is None else self.where(where)
        order: Order
        if shuffle:
            order = ShuffledOrder(self.shard_starts, seed, shuffle_window, self.order_key, chosen_N, num_streams)
        else:
            order = SequentialOrder(np.arange(len(self)) if chosen_N is None else chosen_N)
        dealt = MicroBatches(self, order, batch_sequences=batch_sequences, rank=rank, num_ranks=num_ranks)
        return Batches(self, dealt, make=_as_read, fields=fields, top_k=top_k, threads=threads, ahead=ahead)

    def _stored_as(self, name: str) -> str:
        """Return the name of the field that ``name`` asks for: `LAST_STATE` is the last layer's."""
        is_last = name == LAST_STATE and name not in self.fields and self.manifest.states_field in self.fields
        return self.manifest.states_field if is_last else name

    def _groups(self, indices: list[int], fields: tuple[str, ...]) -> Iterator[list[Piece]]:
        """Open the shards of ``indices``, at most as many at once as may stay open."""
        mean_bytes = self.encoded_bytes(fields) // max(self.manifest.num_shards, 1)
        most = max(1, min(self.max_open_shards, OPEN_BYTES // max(mean_bytes, 1)))
        group: dict[int, ShardArrays] = {}
        pieces: list[Piece] = []
        for index in (min(indices), max(indices)):
            self.shard_of(index)  # raises for an unknown sequence
        runs = runs_of(indices, self.shard_starts)
        self._shards.keep(shard for shard, _ in runs)
        for shard, local in runs:
            if shard not in group and len(group) == most:
                yield pieces
                group, pieces = {}, []
            if shard not in group:
                group[shard] = self._open_shard(shard, fields)
            pieces.append(Piece(shard, group[shard], local))
        yield pieces

    def prefetch(self, shards: Iterable[int], fields: Iterable[str] = ()) -> None:
        """Download ``shards`` of a remote cache in the background, in the order of their first use.

        A later call replaces the shards of an earlier one. The local store keeps each shard until it is read. Does
        nothing for a cache on a local path.
        """
        if self._prefetcher is not None:
            self._prefetcher.expect(shards, self.fields_read(fields), self.max_open_shards)

    def fields_read(self, fields: Iterable[str] = ()) -> list[str]:
        """Return the fields whose objects a read with these ``fields`` opens."""
        return list(dict.fromkeys([TOKENS_FIELD, *self._always.values(), *map(self._stored_as, fields)]))

    def _open_shard(self, shard: int, fields: tuple[str, ...] = ()) -> ShardArrays:
        """Return the arrays of ``shard``, from memory if it is open."""
        arrays = self._shards.get(shard, self.fields_read(fields))
        if self._prefetcher is not None:
            self._prefetcher.opened(shard)
        return arrays

    @cached_property
    def _sequences(self) -> SequenceTable:
        from kdcache.cache.sequence_table import SequenceTable

        return SequenceTable(self.folder, self.manifest.shards, self._most_bytes)

    @cached_property
    def _plan(self) -> PlanTable:
        from kdcache.cache.lookup import PlanTable

        return PlanTable(self.folder, self.manifest, self._most_bytes)

    def _check_open(self) -> None:
        if self._is_closed:
            raise CacheError(f"the cache {self.folder} is closed; open it again with open_cache")

    def open_bytes(self) -> int:
        """Return the bytes of the encoded shards that are in memory."""
        return self._shards.num_bytes()

    def encoded_bytes(self, fields: Iterable[str] = ()) -> int:
        """Return about how many bytes all shards take in memory, encoded, if read with these ``fields``."""
        return sum(self._field_bytes[layout.field_of(self.manifest, name).name] for name in self.fields_read(fields))

    def metadata(self, index: int) -> dict[str, Any]:
        """Return the row of the per-sequence table of sequence ``index``."""
        shard = self.shard_of(index)
        return self.sequences.row(shard, index - int(self.shard_starts[shard]))


def open_cache(
    path: str,
    *,
    max_open_shards: int = 8,
    local_store: LocalStoreConfig | None = None,
    check_crc: bool = True,
    max_decoded_bytes: int | str | None = None,
) -> Cache:
    """Open the finished cache at ``path`` (a directory or any fsspec URL).

    At most ``max_open_shards`` encoded shards stay in memory. Objects of a remote cache are read through
    ``local_store`` (see `kdcache.storage.local_store`), by default 50 GB in ``$KDCACHE_STORE`` or ``~/.cache/kdcache``.
    ``check_crc=False`` skips the checksum of every chunk, and the hash of a local file when it is first opened (half a
    millisecond per MB); this saves some percent of the time, but damage goes mostly unnoticed. An object that would
    take more than ``max_decoded_bytes`` in memory is refused (a number, or a size such as ``20GB``; by default what
    ``$KDCACHE_MAX_DECODED_BYTES`` says, else 8 GiB).

    Raises ``IncompleteCacheError`` for an unfinished dump, ``CorruptCacheError`` for a damaged manifest, and
    ``CacheError`` when there is no cache.

    Example::

        with open_cache("cache") as cache:
            batch = cache.read([0, 1, 2])
    """
    folder = Folder(path)
    manifest, fingerprint = layout.read_manifest(folder)
    if folder.local_path is None:
        folder.store = LocalStore(local_store or LocalStoreConfig())
    return Cache(
        folder, manifest, fingerprint, max_open_shards, check_crc=check_crc, max_decoded_bytes=max_decoded_bytes
    )


def as_cache(cache: Cache | str | os.PathLike[str]) -> Cache:
    """Return ``cache`` itself, or open the one at this path or URL."""
    return cache if isinstance(cache, Cache) else open_cache(os.fspath(cache))


def _load(decoder: BatchDecoder, check_crc: bool, shard: int, names: Sequence[str]) -> dict[str, FieldArrays]:
    return decoder.open(shard, names, check_crc)


def _as_read(batch: SequenceBatch) -> SequenceBatch:
    return batch
