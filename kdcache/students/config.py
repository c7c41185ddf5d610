"""The settings of a student: the part of a training configuration that names a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from kdcache.config import Config
from kdcache.errors import did_you_mean
from kdcache.students.sizes import SIZES

#: Value of ``target_modules`` for every linear layer but the LM head.
ALL_LINEAR: Literal["all-linear"] = "all-linear"


class LoraConfig(Config):
    """Low-rank adapters: their rank, and ``alpha``; their output is multiplied by ``alpha / rank``.

    ``target_modules`` names linear layers of the body by the end of their path (``q_proj``, ``layers.0.mlp.up_proj``).
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_or_names(cls, value: object) -> object:
        is_list = isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)
        if value == ALL_LINEAR or is_list:
            return value
        raise ValueError(f"expected {ALL_LINEAR!r} or a list of module names, such as [q_proj, v_proj]")


class BiEncoderSettings(Config):
    """How a bi-encoder scores two texts; what is None is as the model's own files say, else the default.

    The score is ``scale`` (default 20) x the ``similarity`` (default cosine) of the states, pooled by ``pooling``
    (default mean). A cosine lies between -1 and 1 and wants such a scale to reach the differences of a cross-encoder's
    scores; for a dot product take 1.
    """

    pooling: Literal["mean", "cls", "last"] | None = None
    similarity: Literal["cosine", "dot"] | None = None
    scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class StudentConfig(Config):
    """Which student to train: exactly one of ``model``, ``config_file`` and ``size``.

    ``model`` is a local directory (a previous run, say) or a hub id, at ``revision``. ``config_file`` is a
    ``config.json``, or a YAML mapping with ``model_type`` and sizes, for a fresh student; ``size`` is a name in
    ``SIZES``. ``seed`` decides the weights of a fresh student, and those that ``lora`` adds to a pretrained one.
    """

    model: str | None = Field(default=None, min_length=1)
    config_file: str | None = Field(default=None, min_length=1)
    size: str | None = None
    revision: str | None = None
    keep_layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Start from these layers of ``model`` alone, counted from 0: ``[0, 2, 4]`` keeps half of six layers."""
    projection: Literal["linear"] | None = None
    """For embeddings: add a linear layer to the teacher's width after the pooling, saved with the student."""
    pca: bool | None = None
    """For embeddings: reduce the teacher's embeddings to the student's width instead, by PCA."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(default=0, ge=0, lt=2**32)
    lora: LoraConfig | None = None
    """Train low-rank adapters and freeze the weights."""
    encoder: Literal["cross-encoder", "bi-encoder"] | None = None
    """For ranking: read query and document together (default), or each alone (cheaper to search)."""
    bi_encoder: BiEncoderSettings | None = None
    """How a bi-encoder scores two texts (default: by the model's files, else 20 x the cosine of mean states)."""

    @field_validator("projection", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        return {True: "linear", False: None}[value] if isinstance(value, bool) else value

    @field_validator("pca")
    @classmethod
    def _off_is_absent(cls, value: bool | None) -> bool | None:
        return value or None

    @model_validator(mode="after")
    def _one_origin(self) -> StudentConfig:
        given = [name for name in ("model", "config_file", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of model, config_file and size, found {' and '.join(given) or 'none of them'}"
            )
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown student size {self.size!r}; {did_you_mean(self.size, SIZES)}")
        if self.revision is not None and self.model is None:
            raise ValueError("revision needs model: a fresh student has no revision")
        if self.keep_layers is not None and self.model is None:
            raise ValueError("keep_layers needs model: it chooses among the layers of a pretrained model")
        if self.bi_encoder is not None and self.encoder != "bi-encoder":
            raise ValueError("bi_encoder needs encoder: bi-encoder")
        if self.projection is not None and self.pca:
            raise ValueError(
                "projection and pca exclude each other: the first widens the student, the second reduces the teacher"
            )
        if self.lora is not None and self.model is None:
            raise ValueError("lora needs model: a fresh student has no weights worth freezing")
        return self

    @property
    def is_fresh(self) -> bool:
        """Whether the weights are random."""
        return self.model is None
