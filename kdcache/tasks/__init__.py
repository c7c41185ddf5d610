"""Tasks: the positions that are predicted, the inputs of the models, and the labels."""

from kdcache.plugins import Table
from kdcache.tasks.base import Sequences, Task, TaskSettings

__all__ = ["TASKS", "Sequences", "Task", "TaskSettings", "task_of"]


def task_of(name: str) -> Task:
    """Return the task called ``name``; raises ``ConfigError``."""
    return TASKS[name]


#: Every task by its name on the command line; other packages add theirs in the entry-point group ``kdcache.tasks``.
TASKS: Table[Task] = Table(
    "task",
    "kdcache.tasks",
    {
        "causal-lm": "kdcache.tasks.causal_lm:CausalLM",
        "masked-lm": "kdcache.tasks.masked_lm:MaskedLM",
        "sequence-classification": "kdcache.tasks.sequence_classification:SequenceClassification",
        "sequence-regression": "kdcache.tasks.sequence_classification:SequenceRegression",
        "seq2seq-lm": "kdcache.tasks.seq2seq_lm:Seq2SeqLM",
        "embedding": "kdcache.tasks.embedding:Embedding",
        "ranking": "kdcache.tasks.ranking:Ranking",
    },
    make=lambda kind: kind(),
)
