"""Judging students against a cache: how well they do the task, and how close they came to the teacher."""

from kdcache.evaluation.rows import Evaluation, ModelRow
from kdcache.evaluation.run import evaluate, weight_bytes

__all__ = ["Evaluation", "ModelRow", "evaluate", "weight_bytes"]
