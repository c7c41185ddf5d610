"""Judging students against a cache: how well they do the task, and how close they came to the teacher."""

from kdcache.evaluate.run import evaluate_students, weight_bytes
from kdcache.evaluate.table_rows import Evaluation, ModelRow

__all__ = ["Evaluation", "ModelRow", "evaluate_students", "weight_bytes"]
