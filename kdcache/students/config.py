"""What a student is made from: the one part of a training configuration that names a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kdcache.config import Config
from kdcache.errors import did_you_mean
from kdcache.students.sizes import SIZES


class StudentConfig(Config):
    """Which student to train: exactly one of ``model``, ``config_file`` and ``size``.

    ``model`` is a local directory (a previous run, say) or a hub name, at ``revision``. ``config_file`` is a
    ``config.json``, or a YAML mapping with ``model_type`` and sizes, for a fresh student; ``size`` a row of ``SIZES``.
    ``seed`` decides the weights of a fresh student.
    """

    model: str | None = None
    config_file: str | None = None
    size: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_origin(self) -> StudentConfig:
        given = [name for name in ("model", "config_file", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of model, config_file and size, found {' and '.join(given) or 'none of them'}"
            )
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown student size {self.size!r}, {did_you_mean(self.size, SIZES)}")
        if self.revision is not None and self.model is None:
            raise ValueError("revision belongs to model, a fresh student has none")
        return self

    @property
    def is_fresh(self) -> bool:
        """Whether the weights are drawn at random."""
        return self.model is None
