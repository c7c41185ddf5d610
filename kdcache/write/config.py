"""The configuration of ``kdcache write-targets``: a file, options and ``--set``."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field, model_validator

from kdcache.config import Config
from kdcache.corpus import CorpusConfig
from kdcache.tasks.seq2seq_lm import Seq2SeqSettings
from kdcache.teachers import TeacherConfig

_BEAMS = 4


class Sampling(NamedTuple):
    """How the tokens of a sampled text are drawn."""

    temperature: float
    top_p: float
    seed: int


class WritingConfig(Config):
    """How texts are written: by beam search (1 beam: greedily), or sampled from the teacher's distribution.

    Sequence-level distillation takes the best of a few beams (Kim and Rush, "Sequence-level knowledge distillation",
    2016); sampled texts are more varied. Settings that are None were not given.
    """

    beams: int | None = Field(default=None, ge=1, le=64)
    """Default: 4, unless texts are sampled."""
    sample: bool = False
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Default: 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the fewest most probable tokens that together reach this probability. Default: 1, from all."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """A sampled text depends on it and on the number of its document alone. Default: 0."""

    @model_validator(mode="after")
    def _beams_or_samples(self) -> WritingConfig:
        if self.sample and self.beams is not None:
            raise ValueError("beams belong to beam search; leave them out, or leave out sample")
        of_samples = [name for name in ("seed", "temperature", "top_p") if getattr(self, name) is not None]
        if not self.sample and of_samples:
            raise ValueError(f"{of_samples[0]} is for sampled texts; add sample, or leave it out")
        return self

    @property
    def num_beams(self) -> int:
        """Beams of the search; 1 where texts are sampled."""
        return 1 if self.sample else self.beams or _BEAMS

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn, with a value for every setting."""
        return Sampling(
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.seed or 0,
        )


class WriteConfig(Config):
    """The teacher that writes, the inputs, how it writes, and the output file."""

    output: str = Field(min_length=1)
    """A file of JSON lines."""
    teacher: TeacherConfig
    corpus: CorpusConfig
    sequences: Seq2SeqSettings = Seq2SeqSettings()
    """How inputs are cut and begun; ``max_target_length`` bounds the tokens of a text."""
    writing: WritingConfig = WritingConfig()
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of inputs that are read at once, padding included."""
