"""The configuration of a transcoding: only what is to change; whatever is not given stays as the source has it.

What a source can become follows from what it holds. Kept ids can only become fewer: their mass goes to the tail
exactly. Samples stay as they are. The last hidden state with the teacher's LM head is the whole distribution, so
a cache of the kind hidden can become any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, field_validator

from kdcache.config import Config, build
from kdcache.errors import ConfigError
from kdcache.schema import Manifest, TargetsRecord
from kdcache.targets_config import TargetsConfig, split_layers, state_codec_settings


class StoredStatesConfig(Config):
    """Which of the stored hidden states stay, and their codec; None changes nothing."""

    layers: tuple[str | int, ...] | None = None
    codec: dict[str, Any] | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return None if value is None else split_layers(value)

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec(cls, value: Any) -> Any:
        return None if value is None else state_codec_settings(value)


class TranscodeConfig(Config):
    """Where to transcode from and to, and what is to change."""

    source: str = Field(min_length=1)
    output: str = Field(min_length=1)
    targets: dict[str, Any] = Field(default={})
    """Settings of the targets that change (kind, top_k, min_prob, codec, ...), as a dump takes them."""
    hidden_states: StoredStatesConfig = StoredStatesConfig()
    """Which of the stored hidden states stay, and their codec; the kind hidden always keeps its last one."""
    where: str | None = None
    """Filter on the per-sequence table, such as ``teacher_loss < 5 and num_positions >= 64``."""
    limit_sequences: int | None = Field(default=None, ge=1)
    device: str = "auto"
    """Of the LM head, where one is needed."""
    batch_positions: int = Field(default=8192, ge=1)
    """Positions that are decoded at once."""

    def settings(self) -> dict[str, Any]:
        """Return the settings without paths and devices, for the provenance of the output."""
        hidden_states = self.hidden_states.model_dump(mode="json", exclude_none=True)
        asked = {"targets": self.targets, "hidden_states": hidden_states, "where": self.where}
        return {**asked, "limit_sequences": self.limit_sequences}


def wanted_targets(manifest: Manifest, changes: Mapping[str, Any], source: str) -> TargetsConfig:
    """Return the targets that ``changes`` make of those of a cache.

    Raises ``ConfigError`` for settings that make no sense, and for targets that the cache cannot become.
    """
    held = manifest.targets
    codec = {"name": "compact"} if held.kind == "outputs" else manifest.field("targets").codec
    stays = held.model_dump() if changes.get("kind", held.kind) == held.kind else {}
    settings = {**stays, **changes, "codec": _wanted_codec(codec, changes.get("codec", {}))}
    config = build(TargetsConfig, settings, source="targets")
    wanted = config.record
    if needs_head(held, wanted):
        problems = list(_too_many(wanted, manifest.tokenizer.vocab_size))
    else:
        problems = list(_not_held(held, wanted))
    if problems:
        raise ConfigError(f"{source} cannot become this: {'; '.join(problems)}")
    return config


def needs_head(held: TargetsRecord, wanted: TargetsRecord) -> bool:
    """Whether targets come from hidden states and the LM head, and not from the targets of the source."""
    return held.kind == "hidden" and (wanted.kind != "hidden" or wanted.top_k > held.top_k)


def _wanted_codec(held: Mapping[str, Any], change: Any) -> Any:
    """Return the settings of a codec; those of the source stay where it is the same codec."""
    if isinstance(change, str):
        change = {"name": change}
    if not isinstance(change, Mapping) or change.get("name", held["name"]) != held["name"]:
        return change
    return {**held, **change}


def _too_many(wanted: TargetsRecord, vocab_size: int) -> Iterator[str]:
    if wanted.top_k > vocab_size:
        yield f"top_k {wanted.top_k} is more than the {vocab_size} ids of its vocabulary"


def _not_held(held: TargetsRecord, wanted: TargetsRecord) -> Iterator[str]:
    """Say what of the ``wanted`` targets is not in the ``held`` ones."""
    if wanted.kind != held.kind:
        yield f"it holds targets of the kind {held.kind}, and only those of the kind hidden can become {wanted.kind}"
        return
    if held.num_samples:
        yield from _changed_samples(held, wanted)
        return
    if wanted.top_k > held.top_k:
        yield f"top_k {wanted.top_k} is more than the {held.top_k} ids that it keeps"
    if wanted.min_prob < held.min_prob:
        yield f"min_prob {wanted.min_prob:g} is below {held.min_prob:g}, under which it keeps no ids"
    if wanted.min_mass > held.min_mass:
        yield f"min_mass {wanted.min_mass:g} is above {held.min_mass:g}, which is what its ids have"
    missing = [f"{t:g}" for t in wanted.temperatures if t not in held.temperatures]
    if missing:
        there = ", ".join(f"{t:g}" for t in held.temperatures) or "no temperature but 1"
        yield f"it holds no tails at temperature {', '.join(missing)}, but at {there}"
    if wanted.tail_prior and not held.tail_prior:
        yield "it holds no tail prior"


def _changed_samples(held: TargetsRecord, wanted: TargetsRecord) -> Iterator[str]:
    before, after = held.model_dump(), wanted.model_dump()
    changed = [f"{name} {before[name]!r} to {after[name]!r}" for name in before if before[name] != after[name]]
    if changed:
        yield (
            f"{', '.join(changed)} would be other samples than its {held.kind} targets hold; what can change is the "
            "codec, the hidden states and the sequences"
        )
