"""Tail handling of the forward KL at temperature 1: the probability mass outside the top-k.

The mass of the tail is known exactly, its distribution over ids is not. t are the teacher's probabilities of the kept
ids, a their sum, m = 1 - a the mass of the tail, p the student's probabilities over its whole vocabulary.

============= ========================================== =====================================================
tail          value                                      target of the student
============= ========================================== =====================================================
bucket        KL of the kept ids and one bucket          t on the kept ids, m on all others; a lower bound of
                                                         the full divergence
prior         KL of the completed target                 ... distributed like the mean tail of the cache
uniform       KL of the completed target                 ... distributed uniformly
renormalise   sum t/a (log t/a - log p)                  t/a: no mass outside the kept ids
drop          sum t (log t - log p)                      t/a as well; not a divergence, it can be negative
============= ========================================== =====================================================

The last two are common in other tools and are here for comparison. Samples are an unbiased estimate of the whole
distribution and have a formula of their own (`sampled_kl`).

The completed target needs no array over the vocabulary: its cross-entropy needs the weighted sum of the student's
logits outside the kept ids, one matrix-vector product, whose gradient is a rank-one update.

Shape suffixes: C positions of a chunk, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kdcache.losses.view import ChunkView, Spread

# The mass of the prior outside the kept ids is a difference of float64 sums; below this fraction it is rounding.
_NO_MASS = 1e-12


def bucket_kl(view: ChunkView) -> Tensor:
    """Return the KL over the kept ids and the tail bucket, [C]."""
    return truncated_kl(view) + tail_term(view)


def truncated_kl(view: ChunkView) -> Tensor:
    """Return the sum of the KL's terms over the kept ids, [C]."""
    return kl_terms(view.teacher.logprobs_PK, view.student_logprobs_CK).sum(1)


def renormalised_kl(view: ChunkView) -> Tensor:
    """Return the KL from the kept ids, renormalised to mass 1, to the student, [C]."""
    return kl_terms(view.teacher.logprobs_PK.log_softmax(1), view.student_logprobs_CK).sum(1)


def completed_kl(view: ChunkView, spread: Spread) -> Tensor:
    """Return the KL from the completed target to the student, [C]: the tail's mass is distributed over the other ids.

    Equals `bucket_kl` where no id, or no mass of the prior, is outside the kept ids.
    """
    if view.covers_vocabulary:
        return bucket_kl(view)
    logit_sum_C = view.tail_logit_sum_C(spread)
    mass_C, log_mean_C = _spread_outside(view, spread)
    is_known_C = mass_C > 0
    mass_C = torch.where(is_known_C, mass_C, 1.0)
    # Means under the weights outside the kept ids, of the log of the target and of the student's probability.
    log_target_C = view.teacher.log_tail_P + log_mean_C - mass_C.log()
    tail_C = _expected(view.teacher.log_tail_P, log_target_C - (logit_sum_C / mass_C - view.lse_C))
    return truncated_kl(view) + torch.where(is_known_C, tail_C, tail_term(view))


def sampled_kl(view: ChunkView) -> Tensor:
    """Return an unbiased estimate of the full KL from samples, [C]; it may be negative at single positions.

    Cross-entropy to the samples minus the entropy of the teacher. The gradient is p - q, with the frequencies q of the
    samples; its expectation is the gradient of the full KL.
    """
    cross_C = _expected(view.teacher.logprobs_PK, -view.student_logprobs_CK).sum(1)
    if view.student_log_tail_C is not None:
        cross_C = cross_C + _expected(view.teacher.log_tail_P, -view.student_log_tail_C)
    return cross_C - view.teacher.require("entropy_P")


def tail_term(view: ChunkView) -> Tensor:
    """Return the KL's term of the tail bucket, [C]."""
    if view.student_log_tail_C is None:
        return torch.zeros_like(view.lse_C)
    return kl_terms(view.teacher.log_tail_P, view.student_log_tail_C)


def kl_terms(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """Return t (log t - log p) elementwise, exactly 0 (and without gradient) where t is 0."""
    return _expected(teacher_logprobs, teacher_logprobs - student_logprobs)


def _expected(teacher_logprobs: Tensor, values: Tensor) -> Tensor:
    probs = teacher_logprobs.exp()
    return torch.where(probs > 0, probs * values, 0.0)


def _spread_outside(view: ChunkView, spread: Spread) -> tuple[Tensor, Tensor]:
    """Return the mass of the weights outside the kept ids (0: none) and the mean of their logs under them, [C]."""
    if spread == "uniform":
        mass_C = view.teacher_vocab_size - _num_kept_C(view)
        return mass_C.to(view.logits_CV.dtype), torch.zeros_like(view.teacher.log_tail_P)
    prior_V, terms_V = view.context.prior_V, view.context.prior_terms_V
    assert prior_V is not None
    prior_V = prior_V.double()
    mass_C = prior_V.sum() - _kept_sum(view, prior_V)
    mass_C = torch.where(mass_C > _NO_MASS * prior_V.sum(), mass_C, 0.0)
    log_mean_C = (terms_V.sum() - _kept_sum(view, terms_V)) / torch.where(mass_C > 0, mass_C, 1.0)
    return mass_C.to(view.logits_CV.dtype), log_mean_C.to(view.logits_CV.dtype)


def _num_kept_C(view: ChunkView) -> Tensor:
    if view.pads_CK is None:
        return view.teacher.labels_P.new_full(view.teacher.labels_P.shape, view.teacher.top_k)
    return (~view.pads_CK).sum(1)


def _kept_sum(view: ChunkView, values_V: Tensor) -> Tensor:
    values_CK = values_V[view.teacher.ids_PK]
    return (values_CK if view.pads_CK is None else values_CK.masked_fill(view.pads_CK, 0.0)).sum(1)


TAILS: dict[str, Callable[[ChunkView], Tensor]] = {
    "bucket": bucket_kl,
    "prior": partial(completed_kl, spread="prior"),
    "uniform": partial(completed_kl, spread="uniform"),
    "renormalise": renormalised_kl,
    "drop": truncated_kl,
}
