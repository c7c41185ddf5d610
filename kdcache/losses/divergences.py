"""The losses: each is its own configuration and yields one value per position, in nats.

No loss masks, weights or averages: `Objective` does that, once. So a loss is a formula over a `ChunkView`. Losses
compare the teacher and the student on K + 1 outcomes, the K kept ids and one bucket for everything else: the exact
divergence of the coarsened pair, a lower bound of the full one, and the full one when K = V. Renormalising the top K
instead, as is common, teaches the student that the tail does not exist.

Temperature: a top-k cache knows the tail mass at temperature 1 only. So for T != 1 the split between kept ids and
tail is learnt at T = 1, and only the distribution among the kept ids is softened (*decoupled*). The factor T^2 of
Hinton et al. (2015, section 2) is applied to the softened part, so gradients keep their scale as T changes.

A new loss is one class here and its row in `LOSSES`; the configuration, the trainer and the tests enumerate the table.

Shape suffixes: C positions of a chunk, K kept ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kdcache.config import Config
from kdcache.losses.view import ChunkView


class Loss(Config, ABC):
    """Base of all losses. ``weight`` is what `Objective` multiplies by; 0 measures the loss without training on it."""

    is_divergence: ClassVar[bool]
    """Whether the loss is 0 exactly when student and teacher agree on the K + 1 outcomes."""

    weight: float = Field(ge=0, allow_inf_nan=False)

    @abstractmethod
    def values(self, view: ChunkView) -> Tensor:
        """Return the loss of each of the C positions, [C], unweighted."""


class ForwardKL(Loss):
    """KL(teacher || student) with a tail bucket; for ``temperature`` other than 1 in its decoupled form."""

    is_divergence = True

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def values(self, view: ChunkView) -> Tensor:
        """Return the divergence of each position, [C]."""
        if self.temperature == 1.0:
            return bucket_kl(view)
        return decoupled_kl(view, self.temperature)


class CrossEntropy(Loss):
    """Negative log-likelihood of the corpus's own next token."""

    is_divergence = False

    def values(self, view: ChunkView) -> Tensor:
        """Return the loss of each position, [C]."""
        return -view.gold_logprob_C


def bucket_kl(view: ChunkView) -> Tensor:
    """Return the KL over the kept ids and the tail bucket at temperature 1, [C]."""
    return _kl_terms(view.teacher.logprobs_PK, view.student_logprobs_CK).sum(1) + _tail_term(view)


def decoupled_kl(view: ChunkView, temperature: float) -> Tensor:
    """Return KL(head or tail) at temperature 1 plus head mass x T^2 x KL among the kept ids at T, [C].

    Equals `bucket_kl` at temperature 1 (chain rule of the KL), which is then cheaper.
    """
    teacher_log_head_C = view.teacher.logprobs_PK.logsumexp(1)
    split_C = _kl_terms(teacher_log_head_C, view.student_log_head_C) + _tail_term(view)
    teacher_CK = (view.teacher.logprobs_PK / temperature).log_softmax(1)
    student_CK = (view.student_logits_CK / temperature).log_softmax(1)
    return split_C + teacher_log_head_C.exp() * temperature**2 * _kl_terms(teacher_CK, student_CK).sum(1)


def _tail_term(view: ChunkView) -> Tensor:
    if view.student_log_tail_C is None:
        return torch.zeros_like(view.lse_C)
    return _kl_terms(view.teacher.log_tail_P, view.student_log_tail_C)


def _kl_terms(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """Return t (log t - log p) elementwise, exactly 0 (and without gradient) where t is 0."""
    probs = teacher_logprobs.exp()
    return torch.where(probs > 0, probs * (teacher_logprobs - student_logprobs), 0.0)


LOSSES: dict[str, type[Loss]] = {
    "forward_kl": ForwardKL,
    "cross_entropy": CrossEntropy,
}
