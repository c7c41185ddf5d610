"""The table of losses.

A new loss is one class (see `Loss`) and its row in `LOSSES`; the configuration, the trainer, the documentation and the
tests enumerate the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.losses.base import Loss
from kdcache.losses.context import TeacherContext
from kdcache.losses.f_divergences import JensenShannon, ReverseKL, SkewKL, SkewReverseKL, TotalVariation
from kdcache.losses.forward_kl import ForwardKL
from kdcache.losses.kept_logits import LogitsMSE, Ranking
from kdcache.losses.view import ChunkView
from kdcache.plugins import plugins


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


LOSSES: dict[str, type[Loss]] = {
    "forward_kl": ForwardKL,
    "cross_entropy": CrossEntropy,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "total_variation": TotalVariation,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "logits_mse": LogitsMSE,
    "ranking": Ranking,
}
# Other packages add theirs in this entry-point group.
LOSSES |= plugins("kdcache.losses", LOSSES)
