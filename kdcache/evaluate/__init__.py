"""Evaluate students on a cache: how well they do the task, and how closely they agree with the teacher."""

from kdcache.evaluate.results import Evaluation, ModelRow
from kdcache.evaluate.run import evaluate_students, weight_bytes

__all__ = ["Evaluation", "ModelRow", "evaluate_students", "weight_bytes"]
