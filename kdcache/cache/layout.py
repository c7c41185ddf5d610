"""Paths of the files of a cache, and how its JSON records are read and written.

::

    <cache>/
      plan.json  plan.parquet               what will be written; fixed before the teacher runs
      tokenizer/                            the teacher's tokenizer files
      lm_head.safetensors                   the teacher's LM head, for targets of the kind hidden
      tail_prior.zarr.zip                   mean probability of every id while it is not kept
      fields/tokens/000012-<attempt>.zarr.zip      tokens of a shard
      fields/targets/000012-<attempt>.zarr.zip     targets of the same shard; other fields likewise
      sequences/000012-<attempt>.arrow      one row per sequence of the shard
      commits/000012.json                   written last: the shard exists from here on
      manifest.json                         plan + commit records: the cache is complete
      writer.json                           who writes to it, where that is no local disk; gone in the end
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from kdcache.config import Config
from kdcache.errors import CacheError, CorruptCacheError, IncompleteCacheError, shortened
from kdcache.fields import FIELD_KINDS, TARGETS_FIELD, TOKENS_FIELD
from kdcache.schema import (
    FORMAT_VERSION,
    KNOWN_FEATURES,
    OUTPUTS_FIELD,
    FieldRecord,
    Manifest,
    ObjectRecord,
    Plan,
    ShardRecord,
    TargetsRecord,
)
from kdcache.schema.names import first_repeated
from kdcache.storage.folder import TEMPORARY, Folder
from kdcache.words import are, count

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST, PLAN, PLAN_TABLE = "manifest.json", "plan.json", "plan.parquet"
LM_HEAD, TAIL_PRIOR = "lm_head.safetensors", "tail_prior.zarr.zip"
COMMITS, FIELDS, SEQUENCES, TOKENIZER = "commits", "fields", "sequences", "tokenizer"

#: The per-sequence Arrow table is an object of every shard, but not an array field.
SEQUENCES_FIELD = "sequences"

#: Member of the manifest: SHA-256 of its bytes without the line of this member.
CHECKSUM = "checksum"
_CHECKSUM_LINE = re.compile(rb'^ "checksum": (.*),\n', re.MULTILINE)

#: Most bytes of plan.parquet, whose size no record says.
MAX_TABLE_BYTES = 4 << 30
#: Most bytes of an LM head that is written, before a record says its size.
MAX_HEAD_BYTES = 64 << 30

#: Longest sequence, in tokens or rows.
MAX_LENGTH = 2**31 - 1

R = TypeVar("R", bound=Config)


def commit_name(shard: int) -> str:
    """Name of the commit record of ``shard``."""
    return f"{COMMITS}/{shard:06d}.json"


def object_name(field: str, shard: int, attempt: str) -> str:
    """Name of the object that holds ``field`` of ``shard``."""
    if field == SEQUENCES_FIELD:
        return f"{SEQUENCES}/{shard:06d}-{attempt}.arrow"
    return f"{FIELDS}/{field}/{shard:06d}-{attempt}.zarr.zip"


#: Names that writers give to objects.
_OBJECT = re.compile(r"\d{6,}-[A-Za-z0-9][A-Za-z0-9._-]*\.(zarr\.zip|arrow)")


def is_object_name(path: str) -> bool:
    """Return whether a writer can have written ``path`` as an object; nothing else may be removed as left over."""
    return path.endswith(TEMPORARY) or _OBJECT.fullmatch(path.rpartition("/")[2]) is not None


def object_directories(plan: Plan) -> list[str]:
    """Every directory that may hold objects of this cache."""
    return [SEQUENCES, *(f"{FIELDS}/{field.name}" for field in plan.fields)]


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def to_json(record: Config) -> bytes:
    """Return ``record`` as JSON; equal records give equal bytes."""
    return canonical_json(record.model_dump(mode="json"))


def manifest_json(manifest: Manifest) -> bytes:
    """Return ``manifest`` as it is written: with the checksum by which a reader sees that a byte of it has changed."""
    values = manifest.model_dump(mode="json")
    return canonical_json({**values, CHECKSUM: sha256(canonical_json(values))})


def canonical_json(values: Any) -> bytes:
    """Return the one form in which records are written: sorted keys, indented by 1, ASCII."""
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def from_json(model: type[R], data: bytes, where: str) -> R:
    """Parse a record; raises ``CorruptCacheError`` naming ``where``, ``CacheError`` for a format of another version."""
    try:
        values = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
        _check_version(values, where)
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        member = shortened(".".join(map(str, first["loc"])), 200)
        reason = shortened(first["msg"].removeprefix("Value error, "), 400)
        raise CorruptCacheError(f"{where} is damaged: {member + ': ' if member else ''}{reason}") from None
    except RecursionError:
        raise CorruptCacheError(f"{where} is damaged: it is nested more deeply than any record") from None
    except ValueError as error:
        raise CorruptCacheError(f"{where} is not valid JSON: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the member {shortened(twice)!r} occurs twice")
    return values


def _check_version(values: Any, where: str) -> None:
    # Before validation: what another version has would otherwise be reported as damage.
    if not isinstance(values, dict):
        return
    version, features = values.get("format_version"), values.get("features")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CacheError(
            f"{where} has format version {version}, this kdcache reads {FORMAT_VERSION}; install a newer kdcache"
        )
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise CacheError(
            f"{where} has format version {version}, this kdcache reads {FORMAT_VERSION}; dump the cache again"
        )
    unknown = [name for name in features if name not in KNOWN_FEATURES] if isinstance(features, list) else []
    if unknown:
        raise CacheError(
            f"{where} uses the feature {shortened(unknown[0])!r}, which needs a newer kdcache; install one"
        )


def write_object(folder: Folder, name: str, data: bytes) -> ObjectRecord:
    """Write an object and return its record."""
    folder.write(name, data)
    return ObjectRecord(path=name, num_bytes=len(data), sha256=sha256(data))


def read_object(folder: Folder, record: ObjectRecord, where: str) -> bytes:
    """Read an object of the recorded size, through the folder's local store where it has one.

    Raises ``CorruptCacheError`` naming ``where`` and the file.
    """
    if folder.store is not None:
        return folder.store.read(folder, record, where)
    check_size(folder, record, where)
    return folder.read(record.path, max_bytes=record.num_bytes)


def checked_object(folder: Folder, record: ObjectRecord, where: str) -> bytes:
    """Read an object of the recorded size and hash, as `read_object` does."""
    data = read_object(folder, record, where)
    if sha256(data) != record.sha256:
        raise CorruptCacheError(
            f"{where}: file {record.path} is damaged (its sha256 is not the recorded one); run the command that made "
            "the cache again, which writes the file again"
        )
    return data


def check_size(folder: Folder, record: ObjectRecord, where: str) -> None:
    """Raise ``CorruptCacheError`` unless the file of an object exists and has the recorded size."""
    size = folder.size(record.path)
    if size is None:
        raise CorruptCacheError(f"{where}: file {record.path} is missing from {folder}")
    if size != record.num_bytes:
        raise CorruptCacheError(f"{where}: file {record.path} has {size} bytes, the manifest says {record.num_bytes}")


def table_to_ipc(table: pa.Table) -> bytes:
    """Return ``table`` as an Arrow IPC file, zstd-compressed."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def table_to_parquet(table: pa.Table) -> bytes:
    """Return ``table`` as a Parquet file; equal tables give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_plan(folder: Folder) -> Plan | None:
    """Return the plan of the cache in ``folder``, None when there is none."""
    try:
        data = folder.read(PLAN)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return from_json(Plan, data, f"{folder}/{PLAN}")


def read_commit(folder: Folder, shard: int) -> ShardRecord | None:
    """Return the commit record of ``shard``, None when it is not committed."""
    try:
        data = folder.read(commit_name(shard))
    except FileNotFoundError:
        return None
    return from_json(ShardRecord, data, f"{folder}/{commit_name(shard)}")


def num_commits(folder: Folder, plan: Plan) -> int:
    """Return how many shards of the planned cache have a commit record."""
    # By what is there, not by what the plan says: plans come from strangers too.
    numbers = (name.removeprefix(f"{COMMITS}/").removesuffix(".json") for name in folder.names(COMMITS))
    shards = {int(number) for number in numbers if number.isascii() and number.isdecimal()}
    return sum(shard < plan.num_shards for shard in shards)


def read_manifest(folder: Folder) -> tuple[Manifest, str]:
    """Return the manifest and its SHA-256, the cache's fingerprint.

    Raises ``IncompleteCacheError`` when the dump has not finished, ``CorruptCacheError`` when the manifest is damaged
    or names files outside the cache, and ``CacheError`` when there is no cache.
    """
    try:
        data = folder.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_manifest(folder) from None
    manifest = from_json(Manifest, data, f"{folder}/{MANIFEST}")
    _check_consistent(manifest, folder)
    _check_sum(data, f"{folder}/{MANIFEST}")
    return manifest, sha256(data)


def _check_sum(data: bytes, where: str) -> None:
    """Refuse a manifest whose bytes are not those that were written; older ones say nothing of them."""
    found = _CHECKSUM_LINE.search(data)
    if found and f'"{sha256(data[: found.start()] + data[found.end() :])}"'.encode() != found[1]:
        raise CorruptCacheError(
            f"{where} is damaged: its checksum is not that of its content; copy it again, or delete it and run the "
            "command that made the cache again, which writes it again from the commit records"
        )


def _no_manifest(folder: Folder) -> CacheError:
    plan = read_plan(folder)
    if plan is None:
        return CacheError(f"there is no cache in {folder} (no {MANIFEST}); make one with kdcache dump-teacher")
    return IncompleteCacheError(
        f"{folder} is unfinished: {num_commits(folder, plan)} of {count(plan.num_shards, 'shard')} "
        f"{are(plan.num_shards)} written; run the command that began it again to finish it"
    )


def _check_consistent(manifest: Manifest, folder: Folder) -> None:
    where = f"{folder}/{MANIFEST}"
    if len(manifest.shards) != manifest.num_shards:
        raise CorruptCacheError(
            f"{where}: it lists {count(len(manifest.shards), 'shard')}, num_shards is {manifest.num_shards}"
        )
    if any(shard.index != index for index, shard in enumerate(manifest.shards)):
        raise CorruptCacheError(f"{where}: shards are not 0 to {manifest.num_shards - 1} in order")
    for name in ("num_sequences", "num_positions", "num_tokens"):
        total = sum(getattr(shard, name) for shard in manifest.shards)
        if total != getattr(manifest, name):
            raise CorruptCacheError(f"{where}: shards hold {total} {name}, the plan says {getattr(manifest, name)}")
    targets, num_ids = manifest.targets, manifest.num_ids
    _check_targets(targets, num_ids, where)
    for name in ("max_length", *(["max_target_length"] if "max_target_length" in manifest.sequences else [])):
        found = manifest.sequences.get(name)
        if type(found) is not int or not 0 < found <= MAX_LENGTH:  # True is an int too
            raise CorruptCacheError(
                f"{where}: sequences.{name} is not a number from 1 to {MAX_LENGTH}: {shortened(repr(found))}"
            )
    _check_fields(manifest, where)
    fields = {SEQUENCES_FIELD, *(field.name for field in manifest.fields)}
    for shard in manifest.shards:
        # What arrays without a row per position may make a reader allocate.
        for axis, most in _most_rows(manifest, shard.num_positions).items():
            found = shard.num_rows.get(axis, 0)
            if found > most:
                raise CorruptCacheError(
                    f"{where}: shard {shard.index} has {found} {axis}, more than "
                    f"{count(shard.num_positions, 'position')} can have"
                )
        if set(shard.objects) != fields:
            raise CorruptCacheError(f"{where}: shard {shard.index} has {sorted(shard.objects)}, not {sorted(fields)}")
    missing = sorted(cache_file_names(manifest) - {record.path for record in manifest.cache_files})
    if missing:
        raise CorruptCacheError(f"{where}: there is no record of {missing[0]}, which its targets need")


def _most_rows(manifest: Manifest, num_positions: int) -> dict[str, int]:
    kinds = [FIELD_KINDS[kind] for kind in FIELD_KINDS.own]
    return {axis: most for kind in kinds for axis, most in kind.most_rows(manifest, num_positions).items()}


def _check_fields(manifest: Manifest, where: str) -> None:
    """Check that the fields are there which the kind of targets needs, each once."""
    names = [field.name for field in manifest.fields]
    twice = first_repeated(names)
    if twice is not None:
        raise CorruptCacheError(f"{where}: there are two fields {shortened(twice)!r}")
    targets = manifest.targets
    needed = {TOKENS_FIELD: "tokens"} | ({TARGETS_FIELD: "targets"} if targets.kind != "outputs" else {})
    for name, kind in needed.items():
        if name not in names:
            raise CorruptCacheError(f"{where}: there is no field {name!r}, which such a cache has")
        if manifest.field(name).kind != kind:
            found = manifest.field(name).kind
            raise CorruptCacheError(f"{where}: the field {name!r} has the kind {found!r}, not {kind!r}")
    if targets.kind == "hidden" and manifest.states_field not in names:
        raise CorruptCacheError(f"{where}: targets of the kind hidden need the field {manifest.states_field}")
    if (targets.kind == "outputs" or manifest.outputs is not None) and OUTPUTS_FIELD not in names:
        raise CorruptCacheError(f"{where}: there are no raw outputs, the field {OUTPUTS_FIELD}, which its task needs")


def _check_targets(targets: TargetsRecord, num_ids: int, where: str) -> None:
    """Refuse targets that contradict themselves: what losses may do with rows follows from their kind."""
    for name, kinds in (("top_k", ("top-k", "hybrid", "hidden")), ("num_samples", ("sampled", "hybrid"))):
        found = getattr(targets, name)
        if (found > 0) is not (targets.kind in kinds):
            raise CorruptCacheError(f"{where}: targets of the kind {targets.kind} cannot have a {name} of {found}")
    if targets.top_k > num_ids:
        raise CorruptCacheError(f"{where}: targets.top_k is {targets.top_k}, but there are {count(num_ids, 'id')}")
    if len(set(targets.temperatures)) < len(targets.temperatures) or not all(
        0 < temperature < math.inf and temperature != 1 for temperature in targets.temperatures
    ):
        raise CorruptCacheError(
            f"{where}: targets.temperatures are {list(targets.temperatures)}, expected different numbers above 0, not 1"
        )


def cache_file_names(plan: Plan) -> set[str]:
    """Return the names of the files that a cache has once, in addition to its shards."""
    names = {LM_HEAD} if plan.targets.kind == "hidden" else set()
    return names | ({TAIL_PRIOR} if plan.targets.tail_prior else set())


def field_of(plan: Plan, name: str) -> FieldRecord:
    """Return field ``name``; raises ``CacheError`` listing what the cache holds."""
    try:
        return plan.field(name)
    except KeyError:
        held = ", ".join(field.name for field in plan.fields)
        raise CacheError(f"the cache has no field {name!r}; it holds {held}") from None
