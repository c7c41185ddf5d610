"""What ``kdcache write-targets`` reads from a file, options and ``--set``."""

from __future__ import annotations

from pydantic import Field, model_validator

from kdcache.config import Config
from kdcache.corpus import CorpusConfig
from kdcache.tasks.seq2seq_lm import Seq2SeqSettings
from kdcache.teachers import TeacherConfig

_BEAMS = 4


class WritingConfig(Config):
    """How texts are written: by beam search (1 beam: greedily), or drawn from the teacher's distribution.

    Sequence-level distillation takes the best of a few beams (Kim and Rush, "Sequence-level knowledge distillation",
    2016); drawn texts are more varied.
    """

    beams: int | None = Field(default=None, ge=1, le=64)
    """4 unless texts are drawn."""
    sample: bool = False
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the fewest most probable tokens that together reach this probability are drawn from."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """A drawn text depends on it and on the number of its document alone."""

    @model_validator(mode="after")
    def _beams_or_draws(self) -> WritingConfig:
        if self.sample and self.beams is not None:
            raise ValueError("beams belong to beam search; leave them out, or leave out sample")
        of_samples = sorted({"temperature", "top_p", "seed"} & self.model_fields_set)
        if not self.sample and of_samples:
            raise ValueError(f"{of_samples[0]} is for texts that are drawn; add sample, or leave it out")
        return self

    @property
    def num_beams(self) -> int:
        """Beams of the search; 1 where texts are drawn."""
        return 1 if self.sample else self.beams or _BEAMS


class WriteConfig(Config):
    """Which teacher writes, about what, how, and where to."""

    output: str = Field(min_length=1)
    """A file of JSON lines."""
    teacher: TeacherConfig
    corpus: CorpusConfig
    sequences: Seq2SeqSettings = Seq2SeqSettings()
    """How inputs are cut and begun; ``max_target_length`` bounds the tokens of a text."""
    writing: WritingConfig = WritingConfig()
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of inputs that are read at once, padding included."""
