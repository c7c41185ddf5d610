"""Settings of the stored targets, raw outputs and hidden states of a teacher.

A dump makes them with a running teacher, a transcoding from a cache that holds at least as much. Both read the same
settings, so a target means the same in both. None means not given: the value then follows from the kind of targets
and, in a dump, also from the teacher's capabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS
from kdcache.config import Config, build
from kdcache.errors import ConfigError
from kdcache.plugins import Table
from kdcache.schema import Kind, TargetsRecord
from kdcache.schema.records import Scalar

_CODEC, _HIDDEN_CODEC = "compact", "bf16"


def codec_settings(value: Any, table: Table[Any], default: str) -> Any:
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


#: Settings of a kind of targets that are not given.
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


class TargetsConfig(Config):
    """What is stored of the teacher's distribution at every position, and how the kept ids are encoded.

    Numbers that are None follow from ``kind``: 64 ids and the tail prior for top-k; 50 samples for sampled; 4 ids and
    16 samples for hybrid; the single most probable id, in addition to the state, for hidden. See `TargetsRecord` for
    what the members mean.
    """

    kind: Kind = "top-k"
    top_k: int | None = Field(default=None, ge=0)
    min_prob: float = Field(default=0.0, ge=0, lt=1)
    min_mass: float = Field(default=1.0, gt=0, le=1)
    num_samples: int | None = Field(default=None, ge=0, le=_MOST_SAMPLES)
    seed: int = Field(default=0, ge=0, lt=2**32)
    temperatures: tuple[float, ...] = ()
    tail_prior: bool | None = None
    scalars: tuple[Scalar, ...] | None = None
    """None: all that the kind has and the teacher gives."""
    tail: Literal["exact", "remainder"] | None = None
    """None: ``exact``, or ``remainder`` for a teacher that does not give the exact tail."""
    probabilities: Literal["vocabulary", "kept"] = "vocabulary"
    codec: dict[str, Any] | None = None
    """A codec's name, or a mapping of its settings, in which ``name`` may be left out for the default codec."""

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec(cls, value: Any) -> Any:
        return None if value is None else codec_settings(value, TOPK_CODECS, _CODEC)

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
        for wrong, words in _contradictions(self.record):
            if wrong:
                raise ValueError(f"targets of the kind {self.kind} {words}")
        return self

    @property
    def record(self) -> TargetsRecord:
        """What the plan says about the targets, with a value for every setting; the codec is the field's."""
        given = self.model_dump(exclude={"codec"}, exclude_none=True)
        if self.tail == "remainder" and self.scalars is None:
            without_tail = tuple(n for n in TargetsRecord(kind=self.kind).scalars if n != "log_tail")
            given["scalars"] = without_tail
        return TargetsRecord(**{**_DEFAULTS[self.kind], **given})

    @property
    def codec_settings(self) -> dict[str, Any]:
        """All settings of the codec of the kept ids, the default one where none is given."""
        return codec_settings(_CODEC, TOPK_CODECS, _CODEC) if self.codec is None else self.codec


def _contradictions(record: TargetsRecord) -> Iterator[tuple[bool, str]]:
    """Yield, for each rule, whether ``record`` breaks it, and the rule in words."""
    samples = record.kind in _CAN_SAMPLE
    yield (
        (record.top_k > 0) is (record.kind in _KEEP_NO_IDS),
        "keep no ids, leave top_k out (the kind hybrid keeps some)" if record.top_k else "need a top_k of 1 or more",
    )
    yield (
        (record.num_samples > 0) is not samples,
        "need num_samples of 1 or more" if samples else "take no samples (the kinds sampled and hybrid do)",
    )
    top_k_only = (record.is_ragged, "min_prob and min_mass"), (record.tail_prior, "tail prior")
    for given, name in (*top_k_only, (bool(record.temperatures), "temperatures of the tail")):
        yield given and record.kind != "top-k", f"have no {name} (the kind top-k has)"


def layer_number(layer: str | int, num_layers: int) -> int:
    """Return the number of a layer, given as ``last``, a number, or one that counts from the end.

    Layers that the model does not have are not noticed here. Raises ``ConfigError`` for anything else than these.
    """
    text = str(layer).strip()
    try:
        number = num_layers if text == "last" else int(text)
    except ValueError:
        raise ConfigError(f"hidden states are chosen by layer number or 'last', found {text!r}") from None
    return number + num_layers + 1 if number < 0 else number


class OutputsConfig(Config):
    """How the teacher's raw outputs are stored, for tasks that have some."""

    codec: dict[str, Any] = Field(default={"name": "exact"}, validate_default=True)

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec(cls, value: Any) -> Any:
        return codec_settings(value, VECTOR_CODECS, "exact")


class HiddenStatesConfig(Config):
    """Which hidden states are stored, if any."""

    layers: tuple[str | int, ...] = ()
    """Layer numbers: 0 is the embeddings, ``last`` the state after the final norm, negative ones count from the end."""
    codec: dict[str, Any] = Field(default={"name": _HIDDEN_CODEC}, validate_default=True)

    @field_validator("layers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_layers(value)

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec(cls, value: Any) -> Any:
        return state_codec_settings(value)


def split_layers(value: Any) -> Any:
    """Return the layers that a setting names, as ``last,12`` or in a list; raises ``ValueError``."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    layers = value if isinstance(value, list | tuple) else (value,)
    # To Python true is the number 1.
    if any(isinstance(layer, bool) for layer in layers):
        raise ValueError("expected layer numbers or last, such as [last, 12]")
    return layers


def state_codec_settings(value: Any) -> dict[str, Any]:
    """Return all settings of a codec of hidden states; raises ``ValueError``."""
    found: dict[str, Any] = codec_settings(value, VECTOR_CODECS, _HIDDEN_CODEC)
    return found
