"""Settings of bi-encoders, apart from what runs them: configurations of training are read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdcache.config import Config


class BiEncoderConfig(Config):
    """How two texts get a score: ``scale`` x the ``similarity`` of their pooled states.

    A cosine lies between -1 and 1 and wants a scale of about 20 to reach the differences of a cross-encoder's scores;
    for a dot product take 1.
    """

    pooling: Literal["mean", "cls", "last"] = "mean"
    similarity: Literal["cosine", "dot"] = "cosine"
    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)
