"""Divergences other than forward KL: each a formula over two distributions on the same outcomes.

Module ``outcomes`` says which outcomes; t are the teacher's probabilities of them, p the student's, both softened where
a temperature is set, and the value is then multiplied by a power of T (`power`). None of them is linear in t, so samples
alone cannot estimate them: such caches are refused. There is no treatment of the tail but the bucket either. A reverse
KL over the kept ids alone would pull every other logit down, whatever the teacher thought of it.

Probabilities of 0. Terms with 0 log 0 are 0. What the teacher rules out although the student does not (an id beyond the
teacher's vocabulary, a tail that has underflowed) would make a reverse KL infinite, and one such position would end the
run. So a teacher's probability counts as e^-104 at least, about the smallest float32 there is: the value stays finite,
and the gradient takes the student's mass away from there.

Shape suffixes: C positions of a chunk, O outcomes.
"""

from __future__ import annotations

from abc import abstractmethod
from math import log, log1p
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kdcache.losses.modes import Mode, TemperedLoss
from kdcache.losses.outcomes import IMPOSSIBLE, log_total, outcomes
from kdcache.losses.view import ChunkView

LEAST_LOG_PROB = -104.0
"""What the logarithm of a probability of 0 counts as; float32's own exp is 0 from there on."""


class FDivergence(TemperedLoss):
    """Base of divergences that are a function of two distributions over the same outcomes."""

    is_divergence = True
    ignores_samples = True

    power: ClassVar[int] = 2
    """The power of T that keeps the length of gradients as T grows, as in ``tempered``: T^2 for all that is smooth."""

    def values(self, view: ChunkView) -> Tensor:
        """Return T^2 (see `power`) x the divergence of each position, [C]."""
        teacher_CO, student_CO = outcomes(view, self.resolved_mode(view.context), self.temperature)
        return self.temperature**self.power * self.between(_at_least(teacher_CO), _finite(student_CO))

    @abstractmethod
    def between(self, teacher_CO: Tensor, student_CO: Tensor) -> Tensor:
        """Return the divergence of two distributions, [C], from their finite log-probabilities."""


class ReverseKL(FDivergence):
    """KL(student || teacher) = sum p (log p - log t): it punishes what the teacher would not say (mode seeking).

    In mode ``decoupled`` it is the KL of the split between kept ids and tail at temperature 1, plus the student's mass
    on the kept ids x T^2 x KL among them at T. Source: Gu et al. 2024 (MiniLLM), there on the student's own texts.
    """

    modes: ClassVar[tuple[Mode, ...]] = ("decoupled", "grid", "full")

    def values(self, view: ChunkView) -> Tensor:
        if self.temperature != 1.0 and self.resolved_mode(view.context) == "decoupled":
            return self._decoupled(view)
        return super().values(view)

    def between(self, teacher_CO: Tensor, student_CO: Tensor) -> Tensor:
        return _kl(student_CO, teacher_CO)

    def _decoupled(self, view: ChunkView) -> Tensor:
        teacher_CO, student_CO = outcomes(view, "decoupled", 1.0)
        num_ids = teacher_CO.shape[1] - (0 if view.covers_vocabulary else 1)
        (teacher_split, teacher_among), (student_split, student_among) = (
            _split(log_CO, num_ids, self.temperature) for log_CO in (teacher_CO, student_CO)
        )
        split_C = self.between(_at_least(teacher_split), _finite(student_split))
        among_C = self.between(_at_least(teacher_among), _finite(student_among))
        return split_C + student_split[:, 0].exp() * self.temperature**2 * among_C


class JensenShannon(FDivergence):
    """The generalised Jensen-Shannon divergence: beta KL(t || m) + (1 - beta) KL(p || m), m = beta t + (1 - beta) p.

    At the ends, where it would be 0 for any student, it is what it tends to when divided by beta (or 1 - beta): beta 0
    is the forward KL and beta 1 the reverse KL, as in GKD. So there is a jump: at beta 0.01 the value is a hundredth
    of that at beta 0. Source: Agarwal et al. 2024 (GKD), section 2.
    """

    beta: float = Field(default=0.5, ge=0, le=1)

    def between(self, teacher_CO: Tensor, student_CO: Tensor) -> Tensor:
        if self.beta == 0:
            return _kl(teacher_CO, student_CO)
        if self.beta == 1:
            return _kl(student_CO, teacher_CO)
        mixed_CO = _mixture(teacher_CO, student_CO, self.beta)
        return self.beta * _kl(teacher_CO, mixed_CO) + (1 - self.beta) * _kl(student_CO, mixed_CO)


class TotalVariation(FDivergence):
    """Half the sum of |t - p|, in 0..1 and no nats: the mass that one would have to move.

    At a temperature it is multiplied by T alone: it grows with the difference of the two, the others with its square.
    """

    power = 1

    def between(self, teacher_CO: Tensor, student_CO: Tensor) -> Tensor:
        return (teacher_CO.exp() - student_CO.exp()).abs().sum(1) / 2


class SkewKL(FDivergence):
    """KL(t || alpha t + (1 - alpha) p), at most -log alpha; alpha towards 0 is the forward KL.

    Source: Ko et al. 2024 (DistiLLM), section 3.1.
    """

    alpha: float = Field(default=0.1, gt=0, lt=1)

    def between(self, teacher_CO: Tensor, student_CO: Tensor) -> Tensor:
        return _kl(teacher_CO, _mixture(teacher_CO, student_CO, self.alpha))


class SkewReverseKL(FDivergence):
    """KL(p || (1 - alpha) t + alpha p), at most -log alpha; alpha towards 0 is the reverse KL.

    Source: Ko et al. 2024 (DistiLLM), section 3.1.
    """

    alpha: float = Field(default=0.1, gt=0, lt=1)

    def between(self, teacher_CO: Tensor, student_CO: Tensor) -> Tensor:
        return _kl(student_CO, _mixture(teacher_CO, student_CO, 1 - self.alpha))


def _kl(log_a_CO: Tensor, log_b_CO: Tensor) -> Tensor:
    return (log_a_CO.exp() * (log_a_CO - log_b_CO)).sum(1)


def _mixture(teacher_CO: Tensor, student_CO: Tensor, share: float) -> Tensor:
    """Return log(share t + (1 - share) p)."""
    return torch.logaddexp(teacher_CO + log(share), student_CO + log1p(-share))


def _split(log_CO: Tensor, num_ids: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of (any kept id, tail) at temperature 1, and among the kept ids at ``temperature``."""
    kept_CK, bucket = log_CO[:, :num_ids], log_CO[:, num_ids:]
    among_CK = (kept_CK / temperature).clamp(min=IMPOSSIBLE).log_softmax(1)
    return torch.cat([log_total(kept_CK), bucket], 1), among_CK


def _at_least(teacher: Tensor) -> Tensor:
    return teacher.clamp(min=LEAST_LOG_PROB)


def _finite(student: Tensor) -> Tensor:
    # Not a clamp: whatever is finite keeps its gradient, also that of a student who is e^-200 sure.
    return student.masked_fill(student <= IMPOSSIBLE, LEAST_LOG_PROB)
