"""The configuration of a dump: what ``kdcache dump-teacher`` reads from a file, options and ``--set``."""

from __future__ import annotations

from pydantic import Field, field_validator

from kdcache.config import Config
from kdcache.corpus import CorpusConfig, SequenceConfig
from kdcache.errors import did_you_mean
from kdcache.targets_config import HiddenStatesConfig, TargetsConfig
from kdcache.tasks import TASKS, causal_lm
from kdcache.teachers import TeacherConfig


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
