"""The losses over distributions: cross-entropy, forward KL, other divergences, and losses on the kept logits.

*Forward KL*, KL(teacher || student), is exact or estimated on every kind of cache. By default teacher and student are
compared on K + 1 outcomes, the K kept ids and one bucket for everything else: the exact divergence of the coarsened
pair, a lower bound of the full one, and the full one if K = V. Module `tails` has other ways to handle the tail, module
`temperature` temperatures other than 1.

*Other divergences* (`FDivergence`) are formulas over two distributions on the same `outcomes`, with the probabilities t
of the teacher and p of the student, both softened by the temperature; the value is multiplied by a power of T
(`power`). None of them is linear in t, so samples cannot estimate them, and caches of samples alone are incompatible.
The tail is always one bucket: a reverse KL over the kept ids alone would lower every other logit, whatever the
teacher's probability.

Probabilities of 0. Terms with 0 log 0 are 0. Where the teacher's probability is 0 and the student's is not (an id
beyond the teacher's vocabulary, a tail that has underflowed), a reverse KL would be infinite, and one such position
would ruin the run. So the teacher's probability is at least e^-104, about the smallest float32: the value stays finite,
and the gradient moves the student's mass away.

*Losses on the kept logits* (`LogitsMSE`, `Ranking`) compare the kept ids with each other, not their mass. They do not
see the tail: a student may agree on the kept ids and give them no mass. Use them together with a cross-entropy or a
divergence. They compare the kept ids (without the samples of a hybrid cache), or the whole vocabulary of the teacher if
its logits can be computed (caches of hidden targets). Ids with logit -inf in either model are left out.
Log-probabilities replace the teacher's logits: both losses are invariant to a constant.

Shape suffixes: C positions of a chunk, K compared ids, O outcomes, V the student's vocabulary, U the teacher's.
"""

from __future__ import annotations

from abc import abstractmethod
from math import log, log1p
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcache.losses.base import Loss
from kdcache.losses.tails import TAILS, sampled_kl
from kdcache.losses.teacher import Fact, TeacherContext
from kdcache.losses.temperature import (
    IMPOSSIBLE,
    Mode,
    TemperedLoss,
    among_kept,
    chain_rule,
    decoupled_kl,
    full_kl,
    grid_kl,
    log_total,
    num_kept,
    outcomes,
)
from kdcache.losses.view import ChunkView


class CrossEntropy(Loss):
    """Negative log-likelihood of the gold token or class; 0 where there is none."""

    is_divergence = False
    uses_teacher = False

    needs = "the gold label"

    def values(self, view: ChunkView) -> Tensor:
        """Return the loss of each position, [C]."""
        return torch.where(view.teacher.labels_P >= 0, -view.gold_logprob_C, 0.0)

    def incompatibility(self, context: TeacherContext) -> None:
        """Return None: every cache is compatible, since the teacher's targets are not used."""


class ForwardKL(TemperedLoss):
    """KL(teacher || student) at a temperature.

    ``tail`` selects how ids that were not kept are handled (see module `tails`). ``mode`` selects how a temperature
    other than 1 is applied (see module `temperature`); ``full`` compares the whole vocabulary, also at temperature 1.
    The default is ``full`` if the cache has the teacher's hidden states and LM head, else ``decoupled``. With samples
    the value is an unbiased estimate.
    """

    is_divergence = True

    needs = "the probabilities of the kept ids and of their tail; or samples, at temperature 1"

    modes: ClassVar[tuple[Mode, ...]] = ("decoupled", "grid", "full")

    tail: Literal["bucket", "prior", "uniform", "renormalise", "drop"] = "bucket"

    def values(self, view: ChunkView) -> Tensor:
        """Return the divergence of each position, [C]."""
        mode = self.resolved_mode(view.context)
        if mode == "full":
            return full_kl(view, self.temperature)
        if view.context.is_sampled:
            return sampled_kl(view)
        if self.temperature == 1.0:
            return TAILS[self.tail](view)
        return grid_kl(view, self.temperature) if mode == "grid" else decoupled_kl(view, self.temperature)

    def incompatibility(self, context: TeacherContext) -> str | None:
        if context.head is not None and self.tail != "bucket":
            return (
                f"tail {self.tail} is for caches of kept ids, and the cache holds {context.holds}, which give the "
                "whole tail; leave it out, or transcode the cache to top-k targets"
            )
        if self.resolved_mode(context) == "full":
            return self.incompatibility_of_mode(context)
        missing = context.lacks(*self._needed_facts(context))
        if missing is not None:
            return missing
        if self.tail != "bucket" and (context.is_sampled or self.temperature != 1.0):
            return self._incompatibility_of_tail(context)
        if context.is_sampled and self.temperature != 1.0:
            return (
                f"the cache holds {context.holds}, which estimate the teacher at temperature 1 only, found temperature "
                f"{self.temperature:g}; use temperature 1, or a cache of top-k or hidden targets"
            )
        if self.tail == "prior" and context.prior_V is None:
            return "the cache holds no tail prior; dump it with targets.tail_prior=true, or use tail bucket or uniform"
        return self.incompatibility_of_mode(context)

    def _needed_facts(self, context: TeacherContext) -> tuple[Fact, ...]:
        if context.is_sampled:
            return ("vocabulary_probabilities", "entropy")  # the estimate is a cross-entropy less the entropy
        # These two look at the kept ids alone.
        return () if self.tail in ("renormalise", "drop") else self.needs_facts

    def _incompatibility_of_tail(self, context: TeacherContext) -> str:
        if context.is_sampled:
            return (
                f"tail {self.tail} needs the exact mass of the tail, and the cache holds {context.holds}; "
                "use tail bucket"
            )
        return (
            f"tail {self.tail} exists at temperature 1 only, found temperature {self.temperature:g}; use tail bucket "
            "with it, or temperature 1"
        )


LEAST_LOG_PROB = -104.0
"""Value for log 0; the exp of anything smaller is 0 in float32."""


class FDivergence(TemperedLoss):
    """Base class of divergences between two distributions over the same outcomes."""

    is_divergence = True
    ignores_samples = True

    power: ClassVar[int] = 2
    """The power of T that keeps the scale of gradients as T changes: 2 for smooth divergences."""

    def values(self, view: ChunkView) -> Tensor:
        """Return T^2 (see `power`) x the divergence of each position, [C]."""
        teacher_CO, student_CO = outcomes(view, self.resolved_mode(view.context), self.temperature)
        return self.temperature**self.power * self.between(_at_least(teacher_CO), _finite(student_CO))

    @abstractmethod
    def between(self, teacher_CO: Tensor, student_CO: Tensor) -> Tensor:
        """Return the divergence of two distributions, [C], from their finite log-probabilities."""


class ReverseKL(FDivergence):
    """KL(student || teacher) = sum p (log p - log t): penalises mass where the teacher has none (mode seeking).

    In mode ``decoupled``: the KL of the split between kept ids and tail at temperature 1, plus the student's mass on
    the kept ids x T^2 x KL among them at T. Source: Gu et al. 2024 (MiniLLM), there on texts that the student
    generates.
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
            (_split(log_CO, num_ids), among_kept(log_CO[:, :num_ids], self.temperature, IMPOSSIBLE))
            for log_CO in (teacher_CO, student_CO)
        )
        split_C = self.between(_at_least(teacher_split), _finite(student_split))
        among_C = self.between(_at_least(teacher_among), _finite(student_among))
        return chain_rule(split_C, student_split[:, 0], among_C, self.temperature)


class JensenShannon(FDivergence):
    """The generalised Jensen-Shannon divergence: beta KL(t || m) + (1 - beta) KL(p || m), m = beta t + (1 - beta) p.

    At beta 0 and 1, where the formula is 0 for any student, it is its limit after division by beta (or 1 - beta): beta
    0 is the forward KL and beta 1 the reverse KL, as in GKD. So there is a jump: the value at beta 0.01 is about a
    hundredth of that at beta 0. Source: Agarwal et al. 2024 (GKD), section 2.
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
    """Half the sum of |t - p|, between 0 and 1, not in nats.

    At a temperature it is multiplied by T, not T^2: it is linear in the difference of the two near agreement.
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
    """Return KL(a || b) of finite log-probabilities, [C]; without the guards, and the arrays, of `tails.kl_terms`."""
    return (log_a_CO.exp() * (log_a_CO - log_b_CO)).sum(1)


def _mixture(teacher_CO: Tensor, student_CO: Tensor, share: float) -> Tensor:
    """Return log(share t + (1 - share) p)."""
    return torch.logaddexp(teacher_CO + log(share), student_CO + log1p(-share))


def _split(log_CO: Tensor, num_ids: int) -> Tensor:
    """Return log-probabilities of (any kept id, tail), [C, 2]; [C, 1] if there is no tail."""
    return torch.cat([log_total(log_CO[:, :num_ids]), log_CO[:, num_ids:]], 1)


def _at_least(teacher: Tensor) -> Tensor:
    return teacher.clamp(min=LEAST_LOG_PROB)


def _finite(student: Tensor) -> Tensor:
    # Not a clamp: every finite value keeps its gradient, also a probability of e^-200.
    return student.masked_fill(student <= IMPOSSIBLE, LEAST_LOG_PROB)


class LogitsMSE(Loss):
    """Mean squared difference between the logits of student and teacher, each centred over the compared ids.

    0 for rows of one id. Source: Ba and Caruana 2014, section 2.2, without centring, which would fix the constant that
    softmax ignores.
    """

    is_divergence = False
    ignores_samples = True
    needs = "the logits of the kept ids up to a constant"
    needs_facts = ()

    def values(self, view: ChunkView) -> Tensor:
        """Return the mean of each position, [C]."""
        if view.context.head is not None:
            teacher_CK = view.teacher_logits_CU
            student_CK = view.logits_CV[:, : teacher_CK.shape[1]]
        else:
            teacher_CK, student_CK = _kept(view)
        is_known_CK = teacher_CK.isfinite() & student_CK.isfinite()
        num_known_C1 = is_known_CK.sum(1, keepdim=True).clamp(min=1)
        difference_CK = torch.where(is_known_CK, student_CK - teacher_CK, 0.0)
        centred_CK = difference_CK - difference_CK.sum(1, keepdim=True) / num_known_C1
        return torch.where(is_known_CK, centred_CK, 0.0).square().sum(1) / num_known_C1.squeeze(1)


class Ranking(Loss):
    """ListMLE: negative log-likelihood of the teacher's order of ids, if the student samples without replacement.

    The mean over all ranks but the last of logsumexp(x of this and all later ranks) - x of this rank, with the
    student's logits x in the teacher's order; 0 for rows of one id. Only the first ``top_k`` ids are used: the order of
    unlikely ids is noise. Equal probabilities (codecs round) keep the order of the cache. It is not 0 if both agree.
    Source: Xia et al. 2008, section 5.1.
    """

    is_divergence = False
    ignores_samples = True
    needs = "the order of the kept ids"
    needs_facts = ()

    top_k: int = Field(default=64, ge=2)

    def values(self, view: ChunkView) -> Tensor:
        """Return the mean of each position, [C]."""
        teacher_CK, student_CK = self._ordered(view)
        is_known_CK = teacher_CK.isfinite() & student_CK.isfinite()
        student_CK = student_CK.masked_fill(~is_known_CK, IMPOSSIBLE)
        left_CK = student_CK.flip(1).logcumsumexp(1).flip(1)
        num_choices_C = (is_known_CK.sum(1) - 1).clamp(min=1)
        return torch.where(is_known_CK, left_CK - student_CK, 0.0).sum(1) / num_choices_C

    def _ordered(self, view: ChunkView) -> tuple[Tensor, Tensor]:
        """Return the logits of teacher and student in the teacher's order, [C, K] each."""
        if view.context.head is None:
            teacher_CK, student_CK = _kept(view)
            return teacher_CK[:, : self.top_k], student_CK[:, : self.top_k]
        teacher_CU = view.teacher_logits_CU
        teacher_CK, ids_CK = teacher_CU.topk(min(self.top_k, teacher_CU.shape[1]))
        return teacher_CK, view.logits_CV.gather(1, ids_CK)


def _kept(view: ChunkView) -> tuple[Tensor, Tensor]:
    kept = num_kept(view)
    return view.teacher.logprobs_PK[:, :kept], view.student_logits_CK[:, :kept]
