"""Losses on the logits of the kept ids alone: what they say about each other, not how much mass they have together.

Both are blind to the tail: a student may agree on them and still give the kept ids no mass. They are meant beside a
cross-entropy or a divergence. What they compare are the kept ids (without the samples of a hybrid cache), or the whole
vocabulary of the teacher where its logits can be made (caches of hidden targets). Ids that teacher or student rule out
(logit -inf) have no finite difference from anything and are left out.

Log-probabilities serve as the teacher's logits: both losses are free of a constant.

Shape suffixes: C positions of a chunk, K compared ids, V the student's vocabulary, U the teacher's.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kdcache.losses.base import Loss
from kdcache.losses.outcomes import IMPOSSIBLE, num_kept
from kdcache.losses.view import ChunkView


class LogitsMSE(Loss):
    """Mean squared difference between the logits of student and teacher, each centred over the compared ids.

    0 for rows of one id. Source: Ba and Caruana 2014, section 2.2, who do not centre; without it the loss would pin the
    constant that softmax ignores.
    """

    is_divergence = False
    ignores_samples = True
    needs = "the logits of the kept ids up to a constant"

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
    """How improbable the teacher's order of ids is if the student samples them one by one without replacement.

    ListMLE: the mean over all places but the last of logsumexp(x of this and all later places) - x of this place, with
    the student's logits x in the teacher's order; 0 for rows of one id. At most ``top_k`` ids take part, the teacher's
    first: the order of unlikely ids is noise. Equal probabilities (codecs round) stand in the order in which the cache
    gives them. It is not 0 when both agree. Source: Xia et al. 2008, section 5.1.
    """

    is_divergence = False
    ignores_samples = True
    needs = "the order of the kept ids"

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
