"""The student beside the teacher at a few positions: the numbers every loss is made of, computed once.

All losses on a top-k cache see the student through the same K + 2 numbers per position: its logits at the teacher's K
ids, the logsumexp of its logits outside them, and its logit of the gold token. `_Coarsen` reads them off the [C, V]
logits in one go and has a hand-written backward, because plain autograd would build a [C, V] gradient for each of the
reductions and gathers and then add them up. Everything after it is [C, K] arithmetic, left to autograd: a new loss
writes a formula and never a backward.

A loss may still use ``logits_CV`` itself (a target over the whole vocabulary must); it then pays for its own pass.

Shape suffixes: C positions of a chunk, K kept ids, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcache.losses.teacher_rows import TeacherRows


class ChunkView:
    """Student logits [C, V] (float32 or float64) and the teacher's rows for the same C positions.

    Student quantities are natural logarithms at temperature 1, computed on first use and shared by all losses. The
    teacher's are in the dtype of the logits, so that a float64 student is compared in float64 throughout.
    """

    def __init__(self, logits_CV: Tensor, teacher: TeacherRows) -> None:
        self.logits_CV = logits_CV
        self.teacher = teacher.with_dtype(logits_CV.dtype)

    @property
    def covers_vocabulary(self) -> bool:
        """Whether the teacher's ids are the student's whole vocabulary, so that there is no tail."""
        return self.teacher.top_k == self.logits_CV.shape[1]

    @cached_property
    def lse_C(self) -> Tensor:
        """Log-normaliser: logsumexp of the logits over the whole vocabulary."""
        if self.covers_vocabulary:
            return self._head_lse_C
        return torch.logaddexp(self._head_lse_C, self._rest_lse_C)

    @cached_property
    def student_logits_CK(self) -> Tensor:
        """Student logits at the teacher's ids."""
        return self._coarse[0]

    @cached_property
    def student_logprobs_CK(self) -> Tensor:
        """Student log-probabilities, over the whole vocabulary, at the teacher's ids."""
        return self.student_logits_CK - self.lse_C[:, None]

    @cached_property
    def student_log_head_C(self) -> Tensor:
        """Log of the student's mass on the teacher's ids (exactly 0 when they are the whole vocabulary)."""
        return self._head_lse_C - self.lse_C

    @cached_property
    def student_log_tail_C(self) -> Tensor | None:
        """Log of the student's mass outside the teacher's ids; None when they are the whole vocabulary."""
        # From the logits outside, never log(1 - sum): in float32 that difference can be negative.
        return None if self.covers_vocabulary else self._rest_lse_C - self.lse_C

    @cached_property
    def gold_logprob_C(self) -> Tensor:
        """Student log-probability of the corpus's own next token."""
        return self._coarse[2] - self.lse_C

    @cached_property
    def _coarse(self) -> tuple[Tensor, Tensor, Tensor]:
        return _Coarsen.apply(self.logits_CV, self.teacher.ids_PK, self.teacher.labels_P)

    @cached_property
    def _head_lse_C(self) -> Tensor:
        return self.student_logits_CK.logsumexp(1)

    @property
    def _rest_lse_C(self) -> Tensor:
        return self._coarse[1]


class _Coarsen(torch.autograd.Function):
    """Logits [C, V] to (logits at ids [C, K], logsumexp outside the ids [C], logits at labels [C]).

    One [C, V] array is made; the backward turns it into the gradient in place, so it can run only once (autograd
    raises if it is asked twice).
    """

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, ids_CK: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head_CK = logits_CV.gather(1, ids_CK)
        gold_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
        outside_CV = logits_CV.scatter(1, ids_CK, -torch.inf)
        # The peak outside the ids, not of the row: a small tail must not underflow. Clamped, as -inf - -inf is NaN.
        peak_C1 = outside_CV.amax(1, keepdim=True).clamp(min=torch.finfo(logits_CV.dtype).min)
        outside_CV.sub_(peak_C1).exp_()
        sum_C1 = outside_CV.sum(1, keepdim=True)
        ctx.save_for_backward(outside_CV, sum_C1, ids_CK, labels_C)
        return head_CK, (peak_C1 + sum_C1.log()).squeeze(1), gold_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_head_CK: Tensor, grad_rest_C: Tensor, grad_gold_C: Tensor) -> tuple[Tensor, None, None]:
        outside_CV, sum_C1, ids_CK, labels_C = ctx.saved_tensors
        # The softmax outside the ids: at least 1 in a row that has a finite logit there, 0 only in one that has none.
        grad_CV = outside_CV.mul_(grad_rest_C[:, None] / sum_C1.clamp(min=1))
        grad_CV.scatter_(1, ids_CK, grad_head_CK)
        grad_CV.scatter_add_(1, labels_C[:, None], grad_gold_C[:, None])
        return grad_CV, None, None
