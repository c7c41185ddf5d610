"""The configuration of a dump: what ``kdcache dump-teacher`` reads from a file, options and ``--set``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from kdcache.config import Config, build_nested
from kdcache.corpus import CorpusConfig
from kdcache.errors import ConfigError, unknown
from kdcache.schema import OutputsRecord
from kdcache.targets_config import HiddenStatesConfig, OutputsConfig, TargetsConfig
from kdcache.tasks import TASKS, Task, task_of
from kdcache.tasks.causal_lm import CausalLM
from kdcache.teachers.backends import BACKENDS
from kdcache.teachers.base import BackendConfig, Capabilities

_DEFAULT_BACKEND = "transformers"
#: Codec of targets whose tail is not stored: ``compact`` computes log-probabilities from the tail.
_REMAINDER_CODEC = {"name": "fp16"}


class DumpConfig(Config):
    """Everything a dump needs; each member belongs to the component it configures."""

    output: str = Field(min_length=1)
    teacher: SerializeAsAny[BackendConfig]
    """Settings of a teacher backend, which ``backend`` names (default: transformers)."""
    corpus: CorpusConfig
    task: str = CausalLM.name
    sequences: Any = Field(default_factory=dict, validate_default=True)
    """How documents become sequences: the settings of the task."""
    targets: TargetsConfig | None = None
    """None: what the task and the teacher suggest."""
    outputs: OutputsConfig = OutputsConfig()
    hidden_states: HiddenStatesConfig = HiddenStatesConfig()
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward, padding included (default 4,096 on a CPU, else 16,384); halved when out of memory."""
    shard_positions: int | None = Field(default=None, ge=1)
    """Positions per shard (default: chosen from the corpus so that a crash loses little and files stay few)."""

    @field_validator("teacher", mode="before")
    @classmethod
    def _of_the_backend(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value  # settings of a backend already, or a mistake that the type reports
        name = str(value.get("backend", _DEFAULT_BACKEND))
        if name not in BACKENDS:  # said about this setting alone, not about all of the teacher's
            raise ConfigError(f"'teacher.backend': {unknown(BACKENDS.kind, name, BACKENDS)}")
        backend = BACKENDS[name]
        return build_nested(backend.config, {"backend": backend.name, **value})

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
        if gives == "tokens" and self.targets_config.kind == "outputs":
            raise ValueError(f"task {self.task} has no raw outputs; choose another kind of targets")
        if gives != "tokens" and self.targets is not None:
            kept = "all classes" if gives == "classes" else "the raw outputs"
            raise ValueError(f"task {self.task} stores {kept}, so there are no targets to choose; leave targets out")
        return self

    @property
    def of_task(self) -> Task:
        """The task that is called ``task``."""
        return task_of(self.task)

    @property
    def targets_config(self) -> TargetsConfig:
        """The settings of the targets; the default ones where none are given."""
        return TargetsConfig() if self.targets is None else self.targets

    def for_outputs(self, record: OutputsRecord | None) -> DumpConfig:
        """Return the configuration with the targets that follow from the teacher's raw outputs: all classes, or none.

        ``record`` describes the raw outputs. Targets of tasks that predict tokens stay as they are.
        """
        if record is None:
            return self
        if self.of_task.gives == "outputs":
            targets = TargetsConfig(kind="outputs")
        else:
            targets = TargetsConfig(top_k=record.width, tail_prior=False, codec={"name": "exact"})
        return self.model_copy(update={"targets": targets})

    def for_teacher(self, can: Capabilities) -> DumpConfig:
        """Return the configuration with targets that a teacher of these capabilities gives.

        Only settings that are None change: what is asked for explicitly stays, and `Teacher.check` reports it.
        """
        wanted = self.targets_config
        if can.logits or wanted.kind != "top-k":
            return self
        record, changes = wanted.record, dict[str, Any]()
        if wanted.top_k is None and can.max_top_k is not None:
            changes["top_k"] = min(record.top_k, can.max_top_k)
        if wanted.tail_prior is None:
            changes["tail_prior"] = False
        if wanted.tail is None and wanted.scalars is None and "log_tail" not in can.scalars:
            changes["tail"] = "remainder"
        if wanted.scalars is None:
            changes["scalars"] = tuple(
                name
                for name in record.scalars
                if name in can.scalars or (name == "log_tail" and wanted.tail == "exact")
            )
        if wanted.codec is None and "remainder" in (wanted.tail, changes.get("tail")):
            changes["codec"] = _REMAINDER_CODEC
        return self.model_copy(update={"targets": TargetsConfig(**{**wanted.model_dump(), **changes})})
