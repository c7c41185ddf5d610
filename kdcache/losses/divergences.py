"""The table of losses.

A new loss is one class (see `Loss`) and its row in `LOSSES`; the configuration, the trainer, the documentation and the
tests enumerate the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.losses.base import Loss
from kdcache.losses.context import TeacherContext
from kdcache.losses.view import ChunkView
from kdcache.plugins import Table


class CrossEntropy(Loss):
    """Negative log-likelihood of the corpus's own token or class; 0 where it has none."""

    is_divergence = False
    uses_teacher = False

    needs = "nothing: the corpus's own answer"

    def values(self, view: ChunkView) -> Tensor:
        """Return the loss of each position, [C]."""
        return torch.where(view.teacher.labels_P >= 0, -view.gold_logprob_C, 0.0)

    def refusal(self, context: TeacherContext) -> None:
        """Return None: the teacher plays no part."""


#: Every loss by its name in an objective; other packages add theirs in the entry-point group ``kdcache.losses``.
LOSSES: Table[type[Loss]] = Table(
    "loss",
    "kdcache.losses",
    {
        "forward_kl": "kdcache.losses.forward_kl:ForwardKL",
        "cross_entropy": "kdcache.losses.divergences:CrossEntropy",
        "reverse_kl": "kdcache.losses.f_divergences:ReverseKL",
        "jensen_shannon": "kdcache.losses.f_divergences:JensenShannon",
        "total_variation": "kdcache.losses.f_divergences:TotalVariation",
        "skew_kl": "kdcache.losses.f_divergences:SkewKL",
        "skew_reverse_kl": "kdcache.losses.f_divergences:SkewReverseKL",
        "logits_mse": "kdcache.losses.kept_logits:LogitsMSE",
        "ranking": "kdcache.losses.kept_logits:Ranking",
    },
)
