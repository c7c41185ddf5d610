"""The plan of a transcoding: which sequences of the source, in which shards, with which fields.

Without a filter the shards are those of the source, and fields of which nothing changes are copied as they are stored.
With one, the chosen sequences keep their order, are numbered anew and are cut into shards of the source's size.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache import Cache, layout
from kdcache.cache.fields import field_named
from kdcache.cache.filters import select_sequences
from kdcache.cache.lookup import num_tokens_of, renumbered_plan, with_column
from kdcache.codecs import targets_codec
from kdcache.corpus import assign_shards
from kdcache.errors import ConfigError
from kdcache.fields import TARGETS_FIELD, TOKENS_FIELD, targets_field
from kdcache.schema import STATISTICS_COLUMNS, FieldRecord, Manifest, Plan, layer_field
from kdcache.targets_config import TargetsConfig, layer_number
from kdcache.transcode.config import TranscodeConfig, wanted_targets

#: Positions that tell what another codec of hidden states costs.
_PILOT_POSITIONS = 4096


@dataclass(frozen=True)
class Transcoding:
    """Everything that is decided before the first shard is read."""

    cache: Cache
    plan: Plan
    table: pa.Table
    """Of plan.parquet."""
    sequence_table: pa.Table
    """One row per sequence, without the statistics, which the writer adds."""
    chosen_N: NDArray[np.int64]
    """The source's number of every sequence."""
    starts: NDArray[np.int64]
    copied: tuple[str, ...]
    """Fields that are copied as they are stored."""

    @cached_property
    def lengths_N(self) -> NDArray[np.int64]:
        """Positions of every sequence, [N]."""
        return np.asarray(self.sequence_table["num_positions"]).astype(np.int64)


def plan_transcoding(config: TranscodeConfig, cache: Cache) -> Transcoding:
    """Return the plan of what ``config`` makes of ``cache``; raises ``ConfigError`` or ``CorruptCacheError``."""
    manifest = cache.manifest
    targets = wanted_targets(manifest, config.targets, config.source)
    kept = _kept_fields(config, manifest, targets)
    sequences = cache.sequence_table()
    chosen_N = select_sequences(sequences, config.where, config.limit_sequences)
    everything = len(chosen_N) == manifest.num_sequences
    lengths_N = np.asarray(sequences["num_positions"]).astype(np.int64)[chosen_N]
    starts = cache.shard_starts if everything else assign_shards(lengths_N, manifest.shard_positions)
    fields = [
        _targets_field(manifest, targets)
        if record.name == TARGETS_FIELD
        else _other_field(config, cache, record, chosen_N[: _num_pilot(lengths_N)], everything)
        for record in manifest.fields
        if record.name in kept
    ]
    copied = _copied(manifest, targets, fields) if everything else ()
    table = renumbered_plan(cache.plan_table(), chosen_N, starts, len(cache))
    changes = {
        "targets": targets.record,
        "fields": tuple(fields),
        "num_sequences": len(chosen_N),
        "num_positions": int(lengths_N.sum()),
        "num_tokens": int(num_tokens_of(sequences)[chosen_N].sum()),
        "num_shards": len(starts) - 1,
        "table_sha256": layout.sha256(layout.table_to_parquet(table)),
        "provenance": _provenance(config, cache),
    }
    plan = Plan(**{**{name: getattr(manifest, name) for name in Plan.model_fields}, **changes})
    return Transcoding(cache, plan, table, _sequence_table(sequences, chosen_N), chosen_N, starts, copied)


def origin_of(plan: Plan) -> tuple[Any, ...] | None:
    """Return what says of which sequences of which cache a plan is a transcoding; None for a dump."""
    chain = _chain(plan.provenance)
    if not chain:
        return None
    settings = chain[-1].get("settings")
    chosen = settings if isinstance(settings, dict) else {}
    return chain[-1].get("source"), chosen.get("where"), chosen.get("limit_sequences")


def _kept_fields(config: TranscodeConfig, manifest: Manifest, targets: TargetsConfig) -> set[str]:
    """Return the names of the fields that stay: all but hidden states that are not wanted."""
    held, last = manifest.hidden_layers, manifest.states_field
    stays = {last} if targets.kind == "hidden" else set()
    if config.hidden_states.layers is not None:
        num_layers = manifest.teacher.num_layers or 0
        wanted = {layer_field(layer_number(layer, num_layers)) for layer in config.hidden_states.layers}
    else:
        # Of the kind hidden, the last state was the target.
        wanted = set(held) - ({last} if manifest.targets.kind == "hidden" else set())
    missing = sorted(wanted - set(held))
    if missing:
        raise ConfigError(
            f"{config.source} holds no {', '.join(missing)}; its hidden states are {', '.join(held) or 'none'}"
        )
    return {record.name for record in manifest.fields} - set(held) | wanted | stays


def _copied(manifest: Manifest, targets: TargetsConfig, fields: list[FieldRecord]) -> tuple[str, ...]:
    same = [item.name for item in fields if item.codec == manifest.field(item.name).codec]
    return tuple(name for name in same if name != TARGETS_FIELD or targets.record == manifest.targets)


def _targets_field(manifest: Manifest, targets: TargetsConfig) -> FieldRecord:
    return targets_field(targets_codec(targets.codec_settings, targets.record, manifest.num_ids))


def _num_pilot(lengths_N: NDArray[np.int64]) -> int:
    return max(1, int(np.searchsorted(np.cumsum(lengths_N), _PILOT_POSITIONS)))


def _other_field(
    config: TranscodeConfig, cache: Cache, record: FieldRecord, pilot_N: NDArray[np.int64], everything: bool
) -> FieldRecord:
    """Describe a field in the output; where it is encoded again, with the error that this adds."""
    settings = config.hidden_states.codec if record.name in cache.manifest.hidden_layers else None
    if record.name == TOKENS_FIELD or (everything and settings in (None, {}, record.codec)):
        return record
    field = field_named(cache.fields, cache.manifest, record.name)
    return field.transcoded(settings, cache.read(pilot_N, fields=[record.name]).fields[record.name])


def _sequence_table(table: pa.Table, chosen_N: NDArray[np.int64]) -> pa.Table:
    table = table.drop_columns([name for name in STATISTICS_COLUMNS if name in table.column_names])
    return with_column(table.take(pa.array(chosen_N)), "sequence", np.arange(len(chosen_N))).combine_chunks()


def _provenance(config: TranscodeConfig, cache: Cache) -> dict[str, Any]:
    """Return the provenance of the source with one more link: which cache was transcoded, how, when and by what."""
    before = cache.manifest.provenance
    link = {
        "source": cache.fingerprint,
        "kind": cache.manifest.targets.kind,
        "codec": _codec_of(cache.manifest),
        "settings": config.settings(),
        "kdcache": importlib.metadata.version("kdcache"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return {**before, "transcoded": [*_chain(before), link]}


def _codec_of(manifest: Manifest) -> dict[str, Any] | None:
    """Return the codec of the targets; None where the teacher gives no distribution."""
    return None if manifest.targets.kind == "outputs" else manifest.field(TARGETS_FIELD).codec


def _chain(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    # For people, so a manifest may say anything here.
    links = provenance.get("transcoded")
    return [link for link in links if isinstance(link, dict)] if isinstance(links, list) else []
