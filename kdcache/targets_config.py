"""What is kept of a teacher, as settings: the targets at every position and the hidden states beside them.

Dumps make these from a running teacher, transcoding makes them from a cache that holds at least as much; both read
the same settings, so that a target means the same thing however it came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS
from kdcache.config import Config, build
from kdcache.errors import ConfigError
from kdcache.plugins import Table
from kdcache.schema import TargetsRecord

_CODEC, _HIDDEN_CODEC = "compact", "bf16"


def _codec_settings(value: Any, table: Table[Any], default: str) -> Any:
    """Return all settings of the codec that ``value`` describes: its name, or settings with or without ``name``."""
    if not isinstance(value, str | dict):
        raise ValueError("expected a codec's name or a mapping of its settings")
    settings = {"name": value} if isinstance(value, str) else {"name": default, **value}
    name = str(settings["name"])
    table.check(name)
    # The component validates its own settings and fills in its defaults, which then stand in the manifest.
    try:
        return build(table[name], settings, source=f"codec {name}").model_dump()
    except ConfigError as error:
        raise ValueError(str(error)) from None


#: What a kind of targets keeps unless told otherwise.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 64, "tail_prior": True},
    "sampled": {"top_k": 0, "num_samples": 50},
    "hybrid": {"top_k": 4, "num_samples": 16},
    "hidden": {"top_k": 1},
    "outputs": {"top_k": 0},
}
#: Memory of a dump grows with it; long before, kept ids or hidden states say more for their bytes.
_MOST_SAMPLES = 4096
_CAN_SAMPLE = ("sampled", "hybrid")
_KEEP_NO_IDS = ("sampled", "outputs")


class TargetsConfig(TargetsRecord):
    """What is kept of the teacher's distribution at every position, and how the kept ids are stored.

    Numbers that are not given depend on ``kind``: 64 ids and the tail prior for top-k; 50 samples for sampled; 4 ids and
    16 samples for hybrid; for hidden the single most probable id, beside the state that holds everything.
    """

    model_config = ConfigDict(extra="forbid")

    num_samples: int = Field(default=0, ge=0, le=_MOST_SAMPLES)
    codec: dict[str, Any] = Field(default={"name": _CODEC}, validate_default=True)
    """A codec's name, or a mapping of its settings, in which ``name`` may be left out for the default codec."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {**_DEFAULTS.get(str(data.get("kind", "top-k")), {}), **data}

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec(cls, value: Any) -> Any:
        return _codec_settings(value, TOPK_CODECS, _CODEC)

    @field_validator("temperatures", mode="before")
    @classmethod
    def _a_grid(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return value if isinstance(value, list | tuple) else (value,)

    @field_validator("temperatures")
    @classmethod
    def _useful(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not (0 < t < math.inf) or t == 1 for t in value):
            raise ValueError("temperatures are above 0 and not 1, at which the tail is always stored")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _fits_its_kind(self) -> TargetsConfig:
        for wrong, words in self._contradictions():
            if wrong:
                raise ValueError(f"targets of the kind {self.kind} {words}")
        return self

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        samples = self.kind in _CAN_SAMPLE
        yield (
            (self.top_k > 0) is (self.kind in _KEEP_NO_IDS),
            (
                "keep no ids, leave top_k out (the kind hybrid keeps some)"
                if self.top_k
                else "need a top_k of 1 or more"
            ),
        )
        yield (
            (self.num_samples > 0) is not samples,
            ("need num_samples of 1 or more" if samples else "take no samples (the kinds sampled and hybrid do)"),
        )
        top_k_only = (self.is_ragged, "min_prob and min_mass"), (self.tail_prior, "tail prior")
        for given, name in (*top_k_only, (bool(self.temperatures), "temperatures of the tail")):
            yield given and self.kind != "top-k", f"have no {name} (the kind top-k has)"

    @property
    def record(self) -> TargetsRecord:
        """What the plan says about the targets; the codec is the field's."""
        return TargetsRecord(**self.model_dump(include=set(TargetsRecord.model_fields)))


def layer_number(layer: str | int, num_layers: int) -> int:
    """Return the number of a layer: ``last``, a number, or one that counts from the end; may be one there is not."""
    text = str(layer).strip()
    try:
        number = num_layers if text == "last" else int(text)
    except ValueError:
        raise ConfigError(f"hidden states are chosen by layer number or 'last', found {text!r}") from None
    return number + num_layers + 1 if number < 0 else number


class OutputsConfig(Config):
    """How the teacher's raw outputs are stored, for tasks that have some: exactly, unless a codec is chosen."""

    codec: dict[str, Any] = Field(default={"name": "exact"}, validate_default=True)

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec(cls, value: Any) -> Any:
        return _codec_settings(value, VECTOR_CODECS, "exact")


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
        return _codec_settings(value, VECTOR_CODECS, _HIDDEN_CODEC)
