"""Reading a cache: any sequences, in any order, decoded on demand.

A shard is read whole (one object, one request), its arrays are unpacked and kept *encoded*, and only the rows that a
batch asks for are decoded: memory is bounded by a few encoded shards, about 100 bytes per position. Lookup is by
sequence, never by order, so batch size, shuffling and the number of ranks change nothing.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.folder import Folder
from kdcache.cache.shard_file import unpack
from kdcache.codecs import HiddenCodec, TopKCodec, hidden_codec, topk_codec
from kdcache.errors import CacheError, ConfigError, CorruptCacheError
from kdcache.schema import FieldRecord, Manifest, SequenceBatch, ShardRecord, Targets

#: Encoded shards that stay in memory take at most this much together (but one always stays).
_OPEN_BYTES = 2 << 30


@dataclass
class ShardArrays:
    """The arrays of a shard, unpacked but still encoded, by field and array name."""

    fields: dict[str, dict[str, NDArray[Any]]]
    token_offsets_N1: NDArray[np.int64]
    position_offsets_N1: NDArray[np.int64]


class Cache:
    """A finished cache, open for reading. Make one with `open_cache`."""

    def __init__(self, folder: Folder, manifest: Manifest, fingerprint: str, max_open_shards: int = 8) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = fingerprint
        self.max_open_shards = max_open_shards
        self._codec, self._hidden_codecs = _build_codecs(folder, manifest)
        _check_arrays(folder, manifest, self._codec)
        self._open: OrderedDict[tuple[int, tuple[str, ...]], ShardArrays] = OrderedDict()
        self._lock = threading.Lock()
        counts = [shard.num_sequences for shard in manifest.shards]
        self.shard_starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return self.manifest.num_sequences

    @property
    def vocab_size(self) -> int:
        """True vocabulary size of the teacher's tokenizer."""
        return self.manifest.tokenizer.vocab_size

    @cached_property
    def lengths_N(self) -> NDArray[np.int64]:
        """Positions of every sequence, [N]."""
        return np.asarray(self.sequence_table(columns=["num_positions"])["num_positions"]).astype(np.int64)

    def shard_of(self, index: int) -> int:
        """Return the shard that holds sequence ``index``."""
        if not 0 <= index < len(self):
            raise CacheError(f"there is no sequence {index}; {self.folder} has {len(self)} (0 to {len(self) - 1})")
        return int(np.searchsorted(self.shard_starts, index, side="right")) - 1

    def sequence_table(self, columns: list[str] | None = None) -> pa.Table:
        """Return the per-sequence table of the whole cache: ids, documents, lengths, teacher loss, metadata."""
        tables = []
        for shard in self.manifest.shards:
            table = load_table(self.folder, shard, columns or ())
            tables.append(table.select(columns) if columns else table)
        return pa.concat_tables(tables, promote_options="default")

    def tokenizer_json(self) -> str:
        """Return the teacher's tokenizer.json, for the ``tokenizers`` library."""
        files = self._tokenizer_files()
        if "tokenizer.json" not in files:
            raise CacheError(f"{self.folder} holds no tokenizer.json: its tokenizer has no fast version")
        return files["tokenizer.json"].decode()

    def tokenizer_dir(self) -> Path:
        """Return a local directory with the teacher's tokenizer files (a copy when the cache is remote)."""
        files = self._tokenizer_files()
        local = self.folder.local_path
        if local is not None:
            return local / layout.TOKENIZER
        for name, data in files.items():
            Path(self._tokenizer_copy.name, name).write_bytes(data)
        return Path(self._tokenizer_copy.name)

    @cached_property
    def _tokenizer_copy(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="kdcache-tokenizer-")

    def _tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer's files by name, checked: every student is compared with them."""
        files = {}
        for record in self.manifest.tokenizer_files:
            data = layout.read_object(self.folder, record, "tokenizer")
            if layout.sha256(data) != record.sha256:
                raise CorruptCacheError(
                    f"{self.folder}: file {record.path} is damaged (its sha256 is not the recorded one); the command "
                    "that made the cache writes it again"
                )
            files[Path(record.path).name] = data
        return files

    def read(self, indices: Iterable[int], *, hidden: Iterable[str] = ()) -> SequenceBatch:
        """Read and decode sequences ``indices`` (any order, repeats allowed), with the named hidden-state fields."""
        wanted = [int(index) for index in indices]
        names = tuple(hidden)
        for name in names:
            layout.field_of(self.manifest, name)
        pieces = [self._read_from_shard(shard, local, names) for shard, local in self._by_shard(wanted)]
        return _concatenate(pieces, wanted)

    def _by_shard(self, indices: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Split ``indices`` into runs that lie in one shard, keeping their order."""
        run: list[int] = []
        current = -1
        for index in indices:
            shard = self.shard_of(index)
            if shard != current and run:
                yield current, run
                run = []
            current = shard
            run.append(index - int(self.shard_starts[shard]))
        if run:
            yield current, run

    def _read_from_shard(self, shard: int, local: list[int], hidden: tuple[str, ...]) -> SequenceBatch:
        arrays = self.open_shard(shard, hidden)
        tokens, token_offsets = _row_numbers(arrays.token_offsets_N1, local)
        positions, position_offsets = _row_numbers(arrays.position_offsets_N1, local)
        target_arrays = arrays.fields[layout.TARGETS_FIELD]
        record = self.manifest.field(layout.TARGETS_FIELD)
        try:
            targets = self._codec.decode(_take(record, target_arrays, positions))
        except CorruptCacheError as error:
            raise CorruptCacheError(f"{self.folder}, shard {shard}: {error}") from None
        segments = target_arrays.get("segment_ids")
        return SequenceBatch(
            indices=local,
            tokens_T=target_arrays["tokens"][tokens].astype(np.uint32),
            token_offsets_N1=token_offsets,
            position_offsets_N1=position_offsets,
            loss_mask_P=target_arrays["loss_mask"][positions],
            targets=targets,
            segment_ids_T=None if segments is None else segments[tokens],
            hidden={
                name: self._hidden_codecs[name].decode(arrays.fields[name]["states"][positions]) for name in hidden
            },
        )

    def open_shard(self, shard: int, hidden: tuple[str, ...] = ()) -> ShardArrays:
        """Return the arrays of ``shard``, from memory when it was read lately."""
        key = (shard, hidden)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        arrays = load_shard(self.folder, self.manifest, self.manifest.shards[shard], (layout.TARGETS_FIELD, *hidden))
        with self._lock:
            self._open[key] = arrays
            while len(self._open) > self.max_open_shards or (len(self._open) > 1 and self._open_bytes() > _OPEN_BYTES):
                self._open.popitem(last=False)
        return arrays

    def _open_bytes(self) -> int:
        return sum(array.nbytes for s in self._open.values() for field in s.fields.values() for array in field.values())

    def metadata(self, index: int) -> dict[str, Any]:
        """Return the row of the per-sequence table of sequence ``index``."""
        shard = self.manifest.shards[self.shard_of(index)]
        row = index - int(self.shard_starts[shard.index])
        record: dict[str, Any] = load_table(self.folder, shard).slice(row, 1).to_pylist()[0]
        return record


def open_cache(path: str, *, max_open_shards: int = 8) -> Cache:
    """Open the finished cache at ``path`` (a directory or any fsspec URL).

    Raises ``IncompleteCacheError`` when its dump has not finished, ``CorruptCacheError`` when its manifest is damaged
    and ``CacheError`` when there is none. ``max_open_shards`` bounds how many encoded shards stay in memory.
    """
    folder = Folder(path)
    manifest, fingerprint = layout.read_manifest(folder)
    return Cache(folder, manifest, fingerprint, max_open_shards)


def _build_codecs(folder: Folder, manifest: Manifest) -> tuple[TopKCodec, dict[str, HiddenCodec]]:
    try:
        return topk_codec(manifest.field(layout.TARGETS_FIELD).codec), {
            name: hidden_codec(manifest.field(name).codec) for name in manifest.hidden_layers
        }
    except ConfigError as error:
        raise CacheError(
            f"{folder}/{layout.MANIFEST}: {error} If it was written by a newer kdcache, install it"
        ) from None


def _check_arrays(folder: Folder, manifest: Manifest, codec: TopKCodec) -> None:
    """Refuse a manifest (it may come from a stranger) whose fields lack an array that reading them needs."""
    needed = {name: {"states"} for name in manifest.hidden_layers}
    needed[layout.TARGETS_FIELD] = {"tokens", "loss_mask", "num_tokens", "num_positions"}
    needed[layout.TARGETS_FIELD] |= {array.name for array in codec.arrays(1, manifest.tokenizer.vocab_size)}
    for name, arrays in needed.items():
        missing = sorted(arrays - {array.name for array in manifest.field(name).arrays})
        if missing:
            raise CorruptCacheError(f"{folder}/{layout.MANIFEST}: field {name} lacks the array {missing[0]!r}")


def load_table(folder: Folder, shard: ShardRecord, columns: Iterable[str] = ()) -> pa.Table:
    """Read the per-sequence table of a shard, which must have ``columns``; raises ``CorruptCacheError``."""
    record = shard.objects[layout.SEQUENCES_FIELD]
    where = f"{folder}, shard {shard.index}, field {layout.SEQUENCES_FIELD}"
    table = layout.table_from_ipc(layout.read_object(folder, record, where), f"{where}, file {record.path}")
    missing = [name for name in columns if name not in table.column_names]
    if missing or table.num_rows != shard.num_sequences:
        found = f"no column {missing[0]!r}" if missing else f"{table.num_rows} rows for {shard.num_sequences} sequences"
        raise CorruptCacheError(f"{where}, file {record.path}: the per-sequence table has {found}")
    return table


def load_shard(folder: Folder, manifest: Manifest, shard: ShardRecord, fields: Iterable[str]) -> ShardArrays:
    """Read and unpack the named fields of a shard; raises ``CorruptCacheError`` naming file, shard and field."""
    loaded = {name: _load_field(folder, layout.field_of(manifest, name), shard) for name in fields}
    targets = loaded[layout.TARGETS_FIELD]
    token_offsets, position_offsets = (
        np.concatenate([[0], np.cumsum(targets[name], dtype=np.int64)]) for name in ("num_tokens", "num_positions")
    )
    if token_offsets[-1] != shard.num_tokens or position_offsets[-1] != shard.num_positions:
        raise CorruptCacheError(
            f"{folder}, shard {shard.index}, field {layout.TARGETS_FIELD}: sequences add up to {token_offsets[-1]} "
            f"tokens and {position_offsets[-1]} positions, the manifest says {shard.num_tokens} and "
            f"{shard.num_positions}"
        )
    return ShardArrays(loaded, token_offsets, position_offsets)


def _load_field(folder: Folder, record: FieldRecord, shard: ShardRecord) -> dict[str, NDArray[Any]]:
    item = shard.objects[record.name]
    where = f"{folder}, shard {shard.index}, field {record.name}"
    data = layout.read_object(folder, item, where)
    rows = {
        "positions": shard.num_positions,
        "tokens": shard.num_tokens,
        "sequences": shard.num_sequences,
        "table": None,
    }
    expected = {array.path: (array, rows[array.rows]) for array in record.arrays}
    unpacked = unpack(data, expected, f"{where}, file {item.path}")
    return {array.name: unpacked[array.path] for array in record.arrays}


def _row_numbers(
    offsets_N1: NDArray[np.int64], chosen: list[int]
) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64]]:
    """Return the rows of the ``chosen`` sequences, one after another, and the offsets of each among them."""
    starts, stops = offsets_N1[chosen], offsets_N1[[n + 1 for n in chosen]]
    lengths = stops - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if (stops[:-1] == starts[1:]).all():  # neighbours: a view instead of a copy
        return slice(int(starts[0]), int(stops[-1])), offsets
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets


def _take(record: FieldRecord, arrays: dict[str, NDArray[Any]], rows: NDArray[np.int64] | slice) -> dict[str, Any]:
    per_position = {array.name for array in record.arrays if array.rows == "positions"}
    return {name: values[rows] if name in per_position else values for name, values in arrays.items()}


def _concatenate(pieces: list[SequenceBatch], indices: list[int]) -> SequenceBatch:
    if not pieces:
        raise CacheError("no sequences were asked for")
    if len(pieces) == 1:
        pieces[0].indices = indices
        return pieces[0]

    def join(values: list[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(values)

    def join_offsets(values: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        lengths = np.concatenate([np.diff(offsets) for offsets in values])
        return np.concatenate([[0], np.cumsum(lengths)])

    targets = [piece.targets for piece in pieces]
    segments = [piece.segment_ids_T for piece in pieces if piece.segment_ids_T is not None]
    return SequenceBatch(
        indices=indices,
        tokens_T=join([piece.tokens_T for piece in pieces]),
        token_offsets_N1=join_offsets([piece.token_offsets_N1 for piece in pieces]),
        position_offsets_N1=join_offsets([piece.position_offsets_N1 for piece in pieces]),
        loss_mask_P=join([piece.loss_mask_P for piece in pieces]),
        targets=Targets(
            ids_PK=join([t.ids_PK for t in targets]),
            logprobs_PK=join([t.logprobs_PK for t in targets]),
            log_tail_P=join([t.log_tail_P for t in targets]),
            gold_logprob_P=join([t.gold_logprob_P for t in targets]),
            entropy_P=join([t.entropy_P for t in targets]),
        ),
        segment_ids_T=join(segments) if segments else None,
        hidden={name: join([piece.hidden[name] for piece in pieces]) for name in pieces[0].hidden},
    )


def describe(cache: Cache) -> dict[str, Any]:
    """Return the manifest with the derived totals, as plain JSON types."""
    manifest = cache.manifest
    sums = manifest.statistics
    count = max(sums.num_positions, 1)
    loss = sums.teacher_loss_sum / count
    return {
        "path": str(cache.folder),
        "fingerprint": cache.fingerprint,
        **json.loads(layout.to_json(manifest)),
        "totals": {
            "num_bytes": manifest.num_bytes,
            "bytes_per_token": manifest.bytes_per_token,
            "num_targets": sums.num_positions,
            "teacher_loss": loss,
            "teacher_perplexity": float(np.exp(loss)),
            "teacher_entropy": sums.entropy_sum / count,
            "kept_mass": sums.kept_mass_sum / count,
            "teacher_top1_accuracy": sums.top1_correct / count,
        },
    }
