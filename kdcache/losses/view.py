"""`ChunkView`: student and teacher at a few positions, with the quantities that losses share, computed once.

All losses on a cache of kept ids use the same K + 2 numbers of the student per position: its logits at the teacher's K
ids, the logsumexp of its logits outside them, and its logit of the gold token. `_Coarsen` computes them in one pass
over the [C, V] logits and has a hand-written backward, because autograd would build a [C, V] gradient for each
reduction and gather and then add them up. Everything after it is [C, K] arithmetic, which autograd differentiates: a
new loss needs a formula and no backward. Two more numbers come from the same pass if a loss needs them: the weighted
sum of the logits outside the ids, and the logsumexp at another temperature.

Rows with fewer ids than columns are padded. At the padding the logits of student and teacher are -inf, so formulas need
no special case. A loss may also use ``logits_CV`` itself, at the cost of a pass of its own.

Shape suffixes: C positions of a chunk, K kept ids, V vocabulary (U the teacher's, where the two may differ).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcache.losses.teacher import TeacherContext, TeacherRows

Spread = Literal["uniform", "prior"]
_DEFAULT_CONTEXT = TeacherContext()


class ChunkView:
    """Student logits [C, V] (float32 or float64), the teacher's rows for the same C positions, and their context.

    Student quantities are natural logarithms at temperature 1, computed on first use and shared by all losses. Those of
    the teacher have the dtype of the logits, so a float64 student is compared in float64 throughout.
    """

    def __init__(self, logits_CV: Tensor, teacher: TeacherRows, context: TeacherContext = _DEFAULT_CONTEXT) -> None:
        self.logits_CV = logits_CV
        self.teacher = teacher.with_dtype(logits_CV.dtype)
        self.context = context
        self._coarsened: dict[tuple[Spread | None, float], tuple[Tensor, ...]] = {}

    @property
    def covers_vocabulary(self) -> bool:
        """Whether the teacher's ids are the whole vocabulary of the student, without a tail."""
        return not self.context.has_pads and self.teacher.top_k == self.logits_CV.shape[1]

    @property
    def teacher_vocab_size(self) -> int:
        """Size of the teacher's vocabulary; the student's may be larger."""
        known = self.context.vocab_size
        return self.logits_CV.shape[1] if known is None else known

    @cached_property
    def pads_CK(self) -> Tensor | None:
        """True at padding; None where rows have none."""
        return self.teacher.logprobs_PK.isneginf() if self.context.has_pads else None

    @cached_property
    def lse_C(self) -> Tensor:
        """Log-normaliser: logsumexp of the logits over the whole vocabulary."""
        if self.covers_vocabulary:
            return self._head_lse_C
        return torch.logaddexp(self._head_lse_C, self._coarse()[1])

    @cached_property
    def student_logits_CK(self) -> Tensor:
        """Student logits at the teacher's ids, -inf at pads."""
        head_CK = (next(iter(self._coarsened.values()), None) or self._coarse())[0]
        return head_CK if self.pads_CK is None else head_CK.masked_fill(self.pads_CK, -torch.inf)

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
        return None if self.covers_vocabulary else self._coarse()[1] - self.lse_C

    @cached_property
    def gold_logprob_C(self) -> Tensor:
        """Student log-probability of the gold label; of id 0 where there is none."""
        return self._coarse()[2] - self.lse_C

    @cached_property
    def teacher_logits_CU(self) -> Tensor:
        """The teacher's logits over its whole vocabulary, from its hidden state; float32 or float64, no gradient.

        The context must have the teacher's LM head. The product runs in the dtype of that head, as in the teacher.
        Raises ``ConfigError`` if the rows have no hidden state.
        """
        head = self.context.head
        assert head is not None
        with torch.no_grad():
            hidden_CD = self.teacher.require("hidden_PD").to(head.weight_VD.dtype)
            return head.logits(hidden_CD).to(self.logits_CV.dtype)

    def tail_logit_sum_C(self, spread: Spread) -> Tensor:
        """Return the sum over ids outside the teacher's, and in its vocabulary, of weight x student logit, [C].

        Weights are 1 (``uniform``) or those of the tail prior. Call it before using other quantities, which then come
        from the same pass over the logits.
        """
        return self._coarse(spread)[3]

    def tempered(self, temperature: float) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities at the kept ids [C, K] and the log tail [C] of softmax(logits / temperature).

        The tail is None when the kept ids are the whole vocabulary.
        """
        if self.covers_vocabulary:
            return (self.student_logits_CK / temperature).log_softmax(1), None
        rest_C = self._coarse(None, temperature)[1]
        head_CK = self.student_logits_CK / temperature
        lse_C = torch.logaddexp(_logsumexp(head_CK), rest_C)
        return head_CK - lse_C[:, None], rest_C - lse_C

    def _coarse(self, spread: Spread | None = None, temperature: float = 1.0) -> tuple[Tensor, ...]:
        if spread is None:  # reuse any pass at this temperature
            for (_, made_at), parts in self._coarsened.items():
                if made_at == temperature:
                    return parts
        if (spread, temperature) not in self._coarsened:
            ids_CK, labels_C = self.teacher.ids_PK, self.teacher.labels_P
            settings = (self._weights_U(spread), temperature, self.context.has_pads)
            self._coarsened[spread, temperature] = _Coarsen.apply(self.logits_CV, ids_CK, labels_C, *settings)
        return self._coarsened[spread, temperature]

    def _weights_U(self, spread: Spread | None) -> Tensor | None:
        if spread == "uniform":
            return self.logits_CV.new_ones(self.teacher_vocab_size)
        if spread == "prior":
            assert self.context.prior_V is not None
            return self.context.prior_V.to(self.logits_CV.dtype)
        return None

    @cached_property
    def _head_lse_C(self) -> Tensor:
        return _logsumexp(self.student_logits_CK)


def _logsumexp(logits_CK: Tensor) -> Tensor:
    """Return the logsumexp of each row, the lowest number (not -inf, which has no gradient) where all are -inf."""
    return logits_CK.clamp(min=torch.finfo(logits_CK.dtype).min).logsumexp(1)


class _Coarsen(torch.autograd.Function):
    """Logits [C, V] to (logits at ids [C, K], logsumexp of logits / T outside the ids [C], logits at labels [C]).

    With ``weights_U`` also the weighted sum of the logits outside the ids, [C]. It allocates one [C, V] array, the
    softmax outside the ids; the backward converts it to the gradient in place, so it can run only once (autograd raises
    on a second call).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_CV: Tensor,
        ids_CK: Tensor,
        labels_C: Tensor,
        weights_U: Tensor | None,
        temperature: float,
        has_pads: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        head_CK = logits_CV.gather(1, ids_CK)
        labels_C = labels_C.clamp(min=0)  # NO_LABEL is below all ids
        gold_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
        lowest, sum_outside_C = torch.finfo(logits_CV.dtype).min * min(1.0, temperature), None
        # The logits at the ids are lowered in place and restored below: K of V elements, where a copy would cost as
        # much as the softmax. Through ``data``, so that autograd does not record it.
        outside_CV = logits_CV.data
        if weights_U is not None:
            # Without the ids from the start: subtracting them from the sum over all ids would lose digits.
            sum_outside_C = outside_CV.scatter_(1, ids_CK, 0.0)[:, : len(weights_U)] @ weights_U
        outside_CV.scatter_(1, ids_CK, lowest)
        peak_C = outside_CV.amax(1)
        probs_CV = torch.softmax(outside_CV if temperature == 1.0 else outside_CV / temperature, 1)
        outside_CV.scatter_(1, ids_CK, head_CK)
        # The probability of the peak is 1 / sum exp(x - peak): the logsumexp without another pass of exponentials.
        rest_C = peak_C / temperature - probs_CV.amax(1).log()
        ctx.save_for_backward(probs_CV, ids_CK, labels_C, weights_U)
        ctx.temperature, ctx.has_pads = temperature, has_pads
        return head_CK, rest_C.masked_fill(peak_C <= lowest, -torch.inf), gold_C, sum_outside_C

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_head_CK: Tensor, grad_rest_C: Tensor, grad_gold_C: Tensor, grad_sum_C: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        probs_CV, ids_CK, labels_C, weights_U = ctx.saved_tensors
        # In a row with nothing outside the ids, all of this is overwritten below.
        grad_CV = probs_CV.mul_(grad_rest_C[:, None] / ctx.temperature)
        if weights_U is not None:
            grad_CV[:, : len(weights_U)].addr_(grad_sum_C, weights_U)
        if ctx.has_pads:  # an id is in several columns; its gradient is their sum
            grad_CV.scatter_(1, ids_CK, 0.0).scatter_add_(1, ids_CK, grad_head_CK)
        else:
            grad_CV.scatter_(1, ids_CK, grad_head_CK)
        grad_CV.scatter_add_(1, labels_C[:, None], grad_gold_C[:, None])
        return grad_CV, None, None, None, None, None
