"""The fields of a cache: which arrays they have and which codecs read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from kdcache.cache import layout
from kdcache.codecs import TargetsCodec, VectorCodec, id_dtype, targets_codec, vector_codec
from kdcache.errors import CacheError, ConfigError, CorruptCacheError
from kdcache.schema import ArrayRecord, FieldRecord, Manifest, Plan
from kdcache.storage.folder import Folder

#: Arrays that stand beside the targets where a task needs them: what a `Sequence` may have, as it is stored.
SEGMENT_IDS = ArrayRecord(name="segment_ids", dtype="uint16", rows="tokens")
PLACES = ArrayRecord(name="token_index", dtype="uint32", rows="positions")
WHOLE_LABELS = ArrayRecord(name="labels", dtype="int32", rows="positions")
NUMBER_LABELS = ArrayRecord(name="labels", dtype="float32", rows="positions")
_OPTIONAL = (SEGMENT_IDS, PLACES, WHOLE_LABELS, NUMBER_LABELS)


def token_arrays(vocab_size: int, optional: Iterable[ArrayRecord] = ()) -> tuple[ArrayRecord, ...]:
    """Describe the arrays that stand beside the targets in every shard; ``vocab_size`` is that of the tokens."""
    dtype = id_dtype(vocab_size)
    records = [
        ArrayRecord(name="tokens", dtype=dtype, rows="tokens"),
        ArrayRecord(name="loss_mask", dtype="uint8", rows="positions"),
        ArrayRecord(name="num_tokens", dtype="uint32", rows="sequences"),
        ArrayRecord(name="num_positions", dtype="uint32", rows="sequences"),
    ]
    return (*records, *optional)


def optional_arrays(plan: Plan) -> tuple[ArrayRecord, ...]:
    """Return those of the optional arrays that the field ``targets`` of ``plan`` has."""
    return tuple(array for array in plan.field(layout.TARGETS_FIELD).arrays if array in _OPTIONAL)


def targets_field(codec: TargetsCodec, vocab_size: int, optional: Iterable[ArrayRecord] = ()) -> FieldRecord:
    """Describe the field that every cache has: tokens, masks, and what ``codec`` stores of the teacher.

    ``vocab_size`` is that of the tokens, ``optional`` what the task stores of its sequences besides.
    """
    arrays = (*token_arrays(vocab_size, optional), *codec.arrays())
    return FieldRecord(name=layout.TARGETS_FIELD, kind="targets", codec=codec.head.model_dump(), arrays=arrays)


def build_codecs(folder: Folder, manifest: Manifest) -> tuple[TargetsCodec, dict[str, VectorCodec]]:
    """Return the codecs of the targets and of each hidden-state field; raises ``CacheError`` for unknown ones."""
    try:
        codec = manifest.field(layout.TARGETS_FIELD).codec
        return targets_codec(codec, manifest.targets, manifest.num_ids), {
            name: vector_codec(manifest.field(name).codec) for name in manifest.vector_fields
        }
    except ConfigError as error:
        raise CacheError(
            f"{folder}/{layout.MANIFEST}: {error} If it was written by a newer kdcache, install it"
        ) from None


def check_arrays(
    folder: Folder, manifest: Manifest, codec: TargetsCodec, hidden_codecs: dict[str, VectorCodec]
) -> None:
    """Refuse a manifest (it may come from a stranger) whose fields lack an array that reading them needs."""
    vocab_size = manifest.tokenizer.vocab_size
    needed = {layout.TARGETS_FIELD: targets_field(codec, vocab_size, optional_arrays(manifest)).arrays}
    needed |= {name: vector_codec.arrays(_width(manifest, name)) for name, vector_codec in hidden_codecs.items()}
    for name, arrays in needed.items():
        found = {array.name: array for array in manifest.field(name).arrays}
        for array in arrays:
            where = f"{folder}/{layout.MANIFEST}: field {name}"
            if array.name not in found:
                raise CorruptCacheError(f"{where} lacks the array {array.name!r}")
            if found[array.name] != array:
                raise CorruptCacheError(f"{where} has the array {found[array.name]}, its codec makes {array}")


def _width(manifest: Manifest, name: str) -> int:
    """Return the width of a field of hidden states."""
    return next((array.shape[0] for array in manifest.field(name).arrays if array.shape), 0)


def encoded_bytes(manifest: Manifest) -> dict[str, int]:
    """Return about how many bytes every field takes in memory, encoded, over all shards."""
    counts: Counter[str] = Counter({"table": manifest.num_shards})
    for shard in manifest.shards:
        counts.update(shard.num_rows)
    return {
        field.name: sum(counts[a.rows] * math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in field.arrays)
        for field in manifest.fields
    }
