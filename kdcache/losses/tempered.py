"""Forward KL at any temperature T, by what the cache knows: three ways, none of which guesses.

A row of kept ids has its tail mass at T = 1; at T = 2 most of the mass of a large vocabulary may lie in the tail, so
softening a renormalised top-k is not distillation at T = 2.

- *decoupled*: the split between kept ids and tail is learnt at T = 1, and the distribution among the kept ids at T.
  Exact from any row at any T, and the bucket at T = 1; but it is another loss than the next two.
- *grid*: the tail's mass at T was stored, so kept ids and tail bucket are compared at T.
- *full*: the teacher's logits come from its hidden state and LM head, and the whole vocabulary is compared at T.

The factor T^2 of Hinton et al. (2015, section 2) is applied to what is softened, so gradients keep their scale as T
changes.

Shape suffixes: C positions of a chunk, V the student's vocabulary, U the teacher's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcache.losses.outcomes import outcomes
from kdcache.losses.tails import kl_terms, tail_term
from kdcache.losses.view import ChunkView


def decoupled_kl(view: ChunkView, temperature: float) -> Tensor:
    """Return KL(head or tail) at temperature 1 plus head mass x T^2 x KL among the kept ids at T, [C].

    Equals `tails.bucket_kl` at temperature 1 (chain rule of the KL), which is then cheaper.
    """
    teacher_log_head_C = view.teacher.logprobs_PK.logsumexp(1)
    split_C = kl_terms(teacher_log_head_C, view.student_log_head_C) + tail_term(view)
    teacher_CK = (view.teacher.logprobs_PK / temperature).log_softmax(1)
    # A student may rule out all kept ids: the lowest number has a gradient, -inf in a whole row has none.
    student_CK = (view.student_logits_CK / temperature).clamp(min=torch.finfo(teacher_CK.dtype).min).log_softmax(1)
    return split_C + teacher_log_head_C.exp() * temperature**2 * kl_terms(teacher_CK, student_CK).sum(1)


def grid_kl(view: ChunkView, temperature: float) -> Tensor:
    """Return T^2 x KL over the kept ids and the tail bucket, both models at a temperature of the cache's grid, [C]."""
    return temperature**2 * kl_terms(*outcomes(view, "grid", temperature)).sum(1)


def full_kl(view: ChunkView, temperature: float) -> Tensor:
    """Return T^2 x KL over the whole vocabulary, both models at temperature T, [C]; the exact KL at T = 1."""
    values_C: Tensor = _FullKL.apply(view.logits_CV, view.teacher_logits_CU, temperature)
    return values_C


class _FullKL(torch.autograd.Function):
    """T^2 KL(softmax(z / T) || softmax(x / T)) [C] of student logits x [C, V] and teacher logits z [C, U], U <= V.

    The teacher gives no mass to ids beyond U. The gradient, T (p - t), is made in the forward out of an array that is
    there anyway; autograd's own would keep both distributions and their difference. The backward scales it in place,
    so it can run only once.
    """

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, teacher_logits_CU: Tensor, temperature: float) -> Tensor:
        log_t_CU, log_p_CV = _log_softmax(teacher_logits_CU, temperature), _log_softmax(logits_CV, temperature)
        t_CU = log_t_CU.exp()
        num_ids = t_CU.shape[1]
        # An id that the teacher rules out contributes 0, although log t is then -inf.
        terms_CU = log_t_CU.sub_(log_p_CV[:, :num_ids]).mul_(t_CU).masked_fill_(t_CU == 0, 0.0)
        values_C = temperature**2 * terms_CU.sum(1)
        if ctx.needs_input_grad[0]:
            difference_CV = log_p_CV.exp_()
            difference_CV[:, :num_ids].sub_(t_CU)
            ctx.save_for_backward(difference_CV)
            ctx.temperature = temperature
        return values_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values_C: Tensor) -> tuple[Tensor | None, ...]:
        (difference_CV,) = ctx.saved_tensors
        return difference_CV.mul_(ctx.temperature * grad_values_C[:, None]), None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(1)
