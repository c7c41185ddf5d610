"""The configuration of a dump: what ``kdcache dump-teacher`` reads from a file, options and ``--set``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from kdcache.codecs import HIDDEN_CODECS, TOPK_CODECS
from kdcache.config import Config, build
from kdcache.corpus import CorpusConfig, SequenceConfig
from kdcache.errors import ConfigError, did_you_mean
from kdcache.tasks import TASKS, causal_lm
from kdcache.teachers import TeacherConfig

_CODEC, _HIDDEN_CODEC = "compact", "bf16"


def _codec_settings(value: Any, table: Mapping[str, type[Config]], default: str) -> Any:
    """Return all settings of the codec that ``value`` describes: its name, or settings with or without ``name``."""
    if not isinstance(value, str | dict):
        raise ValueError("expected a codec's name or a mapping of its settings")
    settings = {"name": value} if isinstance(value, str) else {"name": default, **value}
    name = str(settings["name"])
    if name not in table:
        raise ValueError(f"there is no such codec, {did_you_mean(name, table)}")
    # The component validates its own settings and fills in its defaults, which then stand in the manifest.
    try:
        return build(table[name], settings, source=f"codec {name}").model_dump()
    except ConfigError as error:
        raise ValueError(str(error)) from None


class TargetsConfig(Config):
    """What is kept of the teacher's distribution at every position."""

    top_k: int = Field(default=64, ge=1)
    codec: dict[str, Any] = Field(default={"name": _CODEC}, validate_default=True)
    """A codec's name, or a mapping of its settings, in which ``name`` may be left out for the default codec."""

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec(cls, value: Any) -> Any:
        return _codec_settings(value, TOPK_CODECS, _CODEC)


class HiddenStatesConfig(Config):
    """Which hidden states are stored, if any."""

    layers: tuple[str | int, ...] = ()
    """Layer numbers: 0 is the embeddings, ``last`` the state after the final norm, negative ones count from the end."""
    codec: dict[str, Any] = Field(default={"name": _HIDDEN_CODEC}, validate_default=True)

    @field_validator("layers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        layers = value if isinstance(value, list | tuple) else (value,)
        # To Python true is the number 1.
        if any(isinstance(layer, bool) for layer in layers):
            raise ValueError("expected layer numbers or last, such as [last, 12]")
        return layers

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec(cls, value: Any) -> Any:
        return _codec_settings(value, HIDDEN_CODECS, _HIDDEN_CODEC)


class DumpConfig(Config):
    """Everything a dump needs; each part belongs to the component it configures."""

    output: str = Field(min_length=1)
    teacher: TeacherConfig
    corpus: CorpusConfig
    task: str = causal_lm.NAME
    sequences: SequenceConfig = SequenceConfig()
    targets: TargetsConfig = TargetsConfig()
    hidden_states: HiddenStatesConfig = HiddenStatesConfig()
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward, padding included (default 4,096 on a CPU, else 16,384); halved when out of memory."""
    shard_positions: int | None = Field(default=None, ge=1)
    """Positions per shard (default: chosen from the corpus so that a crash loses little and files stay few)."""

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(f"there is no such task, {did_you_mean(value, TASKS)}")
        return value
