"""The configuration of a dump: what ``kdcache dump-teacher`` reads from a file, options and ``--set``."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kdcache.config import Config, build_nested
from kdcache.corpus import CorpusConfig
from kdcache.schema import OutputsRecord
from kdcache.targets_config import HiddenStatesConfig, OutputsConfig, TargetsConfig
from kdcache.tasks import TASKS, Task, task_of
from kdcache.tasks.causal_lm import CausalLM
from kdcache.teachers import TeacherConfig


class DumpConfig(Config):
    """Everything a dump needs; each part belongs to the component it configures."""

    output: str = Field(min_length=1)
    teacher: TeacherConfig
    corpus: CorpusConfig
    task: str = CausalLM.name
    sequences: Any = Field(default_factory=dict, validate_default=True)
    """How documents become sequences: the settings of the task."""
    targets: TargetsConfig = TargetsConfig()
    outputs: OutputsConfig = OutputsConfig()
    hidden_states: HiddenStatesConfig = HiddenStatesConfig()
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward, padding included (default 4,096 on a CPU, else 16,384); halved when out of memory."""
    shard_positions: int | None = Field(default=None, ge=1)
    """Positions per shard (default: chosen from the corpus so that a crash loses little and files stay few)."""

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        TASKS.check(value)
        return value

    @field_validator("sequences", mode="before")
    @classmethod
    def _of_the_task(cls, value: Any, info: ValidationInfo) -> Any:
        task = TASKS.get(info.data.get("task", ""))
        if task is None or isinstance(value, task.settings):
            return value  # of a task that there is not: said already
        return build_nested(task.settings, value)

    @model_validator(mode="after")
    def _targets_fit_the_task(self) -> DumpConfig:
        gives = TASKS[self.task].gives
        if gives == "tokens" and self.targets.kind == "outputs":
            raise ValueError(f"task {self.task} has no raw outputs; choose another kind of targets")
        if gives != "tokens" and "targets" in self.model_fields_set:
            kept = "all classes" if gives == "classes" else "the raw outputs"
            raise ValueError(f"task {self.task} keeps {kept}, so there are no targets to choose; leave targets out")
        return self

    @property
    def of_task(self) -> Task:
        """The task that is called ``task``."""
        return task_of(self.task)

    def for_outputs(self, record: OutputsRecord | None) -> DumpConfig:
        """Return the configuration with the targets that follow from the teacher's ``outputs``: all classes, or none.

        Those of tasks about tokens stay as they are.
        """
        if record is None:
            return self
        if self.of_task.gives == "outputs":
            targets = TargetsConfig(kind="outputs")
        else:
            targets = TargetsConfig(top_k=record.width, tail_prior=False, codec={"name": "exact"})
        return self.model_copy(update={"targets": targets})
