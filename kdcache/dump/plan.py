"""The plan of a dump: everything that is decided before the teacher runs over the corpus."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.codecs import targets_codec, vector_codec
from kdcache.config import Config
from kdcache.corpus import Corpus, assign_shards
from kdcache.dump.config import DumpConfig
from kdcache.errors import ConfigError
from kdcache.fields import targets_field, tokens_field, vectors_field
from kdcache.schema import (
    OUTPUTS_FIELD,
    CorpusRecord,
    FieldRecord,
    OutputsRecord,
    Plan,
    TeacherRecord,
    TokenizerRecord,
    layer_field,
    public_name,
)
from kdcache.tasks import Sequences

#: A shard is not made larger than this (uncompressed), because it is assembled in memory.
_SHARD_BYTES = 512 << 20
_LIBRARIES = ("kdcache", "torch", "transformers", "tokenizers", "datasets", "zarr", "numcodecs", "numpy", "pyarrow")


class LayerPilot(NamedTuple):
    """What a pilot measured on the hidden states of a layer."""

    width: int
    relative_error: float | None
    """Root mean square of |decoded - state| / |state|."""


def check_top_k(config: DumpConfig, vocab_size: int) -> None:
    """Raise ``ConfigError`` when ``top_k`` is larger than the vocabulary."""
    top_k = config.targets_config.record.top_k
    if top_k > vocab_size:
        raise ConfigError(f"--top-k {top_k} is more than the {vocab_size} ids of the tokenizer's vocabulary")


def make_fields(
    config: DumpConfig,
    teacher: TeacherRecord,
    vocab_size: int,
    layers: list[int],
    pilot: Mapping[int, LayerPilot],
    outputs: OutputsRecord | None = None,
) -> list[FieldRecord]:
    """Describe the fields that this dump stores; ``pilot`` has what was measured on the hidden states of a layer."""
    num_ids = len(outputs.labels) if outputs is not None and outputs.labels else vocab_size
    check_top_k(config, num_ids)
    targets = config.targets_config
    fields = [tokens_field(vocab_size, config.of_task.arrays(config.sequences, outputs))]
    if targets.kind != "outputs":
        fields.append(targets_field(targets_codec(targets.codec_settings, targets.record, num_ids)))
    if outputs is not None:
        fields.append(vectors_field(OUTPUTS_FIELD, vector_codec(config.outputs.codec), outputs.width))
    codec = vector_codec(config.hidden_states.codec)
    for layer in layers:
        known = pilot.get(layer, LayerPilot(teacher.hidden_size or 0, None))
        fields.append(vectors_field(layer_field(layer), codec, known.width, relative_error=known.relative_error))
    return fields


def shard_positions(config: DumpConfig, sequences: Sequences | Plan, teacher: TeacherRecord, num_layers: int) -> int:
    """Return how many positions a shard holds: about 32 shards, within 512 MB of memory.

    A shard has 2^14 to 2^19 positions of a causal model, and of other models as many positions as have so many tokens.
    """
    if config.shard_positions is not None:
        return config.shard_positions
    targets = config.targets_config.record
    states_bytes = 4 * (teacher.hidden_size or 0) * num_layers
    per_position = 8 * (targets.top_k + targets.num_samples) + states_bytes + 16
    num_fed = sequences.num_tokens - sequences.num_sequences
    wanted = min(max(num_fed // 32, 1 << 14), 1 << 19)
    if num_fed > sequences.num_positions:
        wanted = wanted * sequences.num_positions // num_fed
    return max(1, min(wanted, _SHARD_BYTES // per_position))


def make_plan(
    config: DumpConfig,
    corpus: Corpus,
    sequences: Sequences,
    teacher: TeacherRecord,
    tokenizer: TokenizerRecord,
    layers: list[int],
    pilot: Mapping[int, LayerPilot] | None = None,
    outputs: OutputsRecord | None = None,
) -> tuple[Plan, pa.Table, NDArray[np.int64]]:
    """Return the plan, the table of plan.parquet (one row per piece of a document) and the starts of the shards."""
    teacher = teacher.model_copy(update={"name": public_name(teacher.name)})
    fields = make_fields(config, teacher, tokenizer.vocab_size, layers, pilot or {}, outputs)
    size = shard_positions(config, sequences, teacher, len(layers))
    starts = assign_shards(sequences.lengths_N, size)
    table = sequences.table()
    shard_of = np.searchsorted(starts, np.asarray(table["sequence"]), side="right") - 1
    table = table.append_column("shard", pa.array(shard_of.astype(np.int32)))
    plan = Plan(
        task=config.task,
        teacher=teacher,
        tokenizer=tokenizer,
        corpus=CorpusRecord(
            sources=tuple(public_name(source) for source in corpus.sources),
            text_field=corpus.text_field,
            fingerprint=corpus.fingerprint,
            num_documents=sequences.num_documents,
            num_empty=sequences.num_empty,
            num_too_short=sequences.num_too_short,
            metadata_columns=tuple(corpus.metadata_columns),
            licence=config.corpus.licence,
            num_truncated=sequences.num_truncated,
        ),
        targets=config.targets_config.record,
        sequences=sequences_record(config.sequences),
        fields=tuple(fields),
        outputs=outputs,
        num_sequences=sequences.num_sequences,
        num_positions=sequences.num_positions,
        num_tokens=sequences.num_tokens,
        num_shards=len(starts) - 1,
        shard_positions=size,
        table_sha256=layout.sha256(layout.table_to_parquet(table)),
        provenance=_provenance(config),
    )
    return plan, table, starts


def sequences_record(settings: Config) -> dict[str, Any]:
    """Return the settings of the task as the plan has them: without those that older plans lack, where they change
    nothing, so that dumps begun by older versions are finished.
    """
    found = settings.model_dump(mode="json")
    if found.get("add_special_tokens"):
        del found["add_special_tokens"]
    return found


def _provenance(config: DumpConfig) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "configuration": _public_configuration(config),
    }


def _public_configuration(config: DumpConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"output"})
    settings["teacher"] = config.teacher.public()
    settings["corpus"]["paths"] = [public_name(path) for path in config.corpus.paths]
    return settings
