"""Tasks: what a row is, what the models are fed, and which row belongs to which label."""

from kdcache.errors import ConfigError, did_you_mean
from kdcache.plugins import plugins
from kdcache.tasks.base import Sequences, Task, TaskSettings
from kdcache.tasks.causal_lm import CausalLM
from kdcache.tasks.embedding import Embedding
from kdcache.tasks.masked_lm import MaskedLM
from kdcache.tasks.ranking import Ranking
from kdcache.tasks.seq2seq_lm import Seq2SeqLM
from kdcache.tasks.sequence_classification import SequenceClassification, SequenceRegression

__all__ = ["TASKS", "Sequences", "Task", "TaskSettings", "task_of"]


def task_of(name: str) -> Task:
    """Return the task called ``name``; raises ``ConfigError``."""
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}, {did_you_mean(name, TASKS)}")
    return TASKS[name]


#: Every task by its name on the command line; other packages add theirs in the entry-point group ``kdcache.tasks``.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CausalLM(),
        MaskedLM(),
        SequenceClassification(),
        SequenceRegression(),
        Seq2SeqLM(),
        Embedding(),
        Ranking(),
    )
}
TASKS |= {name: make() for name, make in plugins("kdcache.tasks", TASKS).items()}
