"""Temperatures other than 1: the modes, and how each compares teacher and student.

A row of kept ids has its tail mass at T = 1 and at the temperatures that the dump stored; at T = 2 most of the mass of
a large vocabulary may be in the tail, so softening a renormalised top-k is not distillation at T = 2. There are three
modes, and all are exact:

- *decoupled*: compares the split between kept ids and tail at T = 1, and the distribution among the kept ids at T
  (`chain_rule`). It needs kept ids only, and equals the bucket at T = 1; but it is another loss than the next two.
- *grid*: compares kept ids and tail bucket at T; needs the stored mass of the tail at T.
- *full*: compares the whole vocabulary at T; needs the teacher's hidden states and LM head.

The factor T^2 of Hinton et al. (2015, section 2) is applied to the softened part, so gradients keep their scale as T
changes. A loss lists its modes in `TemperedLoss.modes`; a mode that the cache does not support is rejected before
training.

`outcomes` gives teacher and student as two distributions over the same outcomes: the whole vocabulary where the
teacher's logits can be made, otherwise its kept ids and one bucket for everything else, an exact coarsening of both
distributions. An f-divergence of a coarsened pair is a lower bound of the full one, and grows as ids are added. The
samples of a hybrid cache, which share the tail's mass, are added to the bucket, so that nothing is an estimate. Padding
of ragged rows has probability 0 on both sides. There is no bucket if the kept ids are the whole vocabulary.

Shape suffixes: C positions of a chunk, K kept ids, O outcomes, V the student's vocabulary, U the teacher's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kdcache.losses.base import Loss
from kdcache.losses.schedules import Temperature
from kdcache.losses.tails import kl_terms, tail_term
from kdcache.losses.teacher import TeacherContext
from kdcache.losses.view import ChunkView

Mode = Literal["decoupled", "grid", "full"]


class TemperedLoss(Loss):
    """Base class of losses between two distributions with a temperature.

    ``mode`` selects how a temperature other than 1 is applied; ``full`` compares the whole vocabulary, also at
    temperature 1. The default is ``full`` if the cache has the teacher's hidden states and LM head, else the first of
    ``modes``.
    """

    modes: ClassVar[tuple[Mode, ...]] = ("grid", "full")
    """The modes of the loss at temperatures other than 1, the default first."""

    temperature: Temperature = 1.0
    mode: Mode | None = None

    def resolved_mode(self, context: TeacherContext) -> Mode:
        """Return the mode for such a cache."""
        if self.mode is not None:
            return self.mode
        return "full" if context.head is not None else self.modes[0]

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why these settings cannot be used with such a cache, and what to do instead; None if they can."""
        return super().incompatibility(context) or self.incompatibility_of_mode(context)

    def incompatibility_of_mode(self, context: TeacherContext) -> str | None:
        """Return why mode and temperature cannot be used with such a cache; None if they can."""
        mode = self.resolved_mode(context)
        if mode == "full":
            return self._incompatibility_of_full(context)
        if self.temperature == 1.0:
            return None
        if mode not in self.modes:
            return (
                f"mode {mode} needs a chain rule, which this divergence does not have; use temperature 1 (found "
                f"{self.temperature:g}), mode grid with a cache that stores the tail at this temperature, or a cache "
                "of hidden targets"
            )
        if mode == "grid" and context.grid_index(self.temperature) is None:
            return self._incompatibility_of_grid(context)
        return None

    def _incompatibility_of_full(self, context: TeacherContext) -> str | None:
        if context.head is not None:
            return None
        return (
            "mode full needs the teacher's last hidden state and LM head, and the cache holds "
            f"{context.holds}; dump with --targets hidden, or use another mode"
        )

    def _incompatibility_of_grid(self, context: TeacherContext) -> str:
        stored = ", ".join(f"{temperature:g}" for temperature in context.temperatures)
        found = f"stores the tail at the temperatures {stored}" if stored else "stores the tail at temperature 1 only"
        other = "mode decoupled" if "decoupled" in self.modes else "a cache of hidden targets"
        # Samples take the place of the tail, so no dump of them stores its mass.
        more = "" if context.is_sampled else "; a dump stores the tail at others with --temperatures"
        return (
            f"mode grid needs the mass of the tail at temperature {self.temperature:g}, and the cache {found}; use "
            f"temperature 1{', one of these' if stored else ''}, or {other}{more}"
        )


IMPOSSIBLE = -1e30
"""Stands for log 0: sums are differentiable there, unlike at -inf, and differences of two are finite in float32."""


def outcomes(view: ChunkView, mode: Mode, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of teacher and student at ``temperature``, [C, O] each.

    Values of `IMPOSSIBLE` or less (also -inf) stand for a probability of 0. In mode ``decoupled``, which applies the
    temperature among the kept ids only, pass temperature 1.
    """
    if mode == "full":
        return _vocabulary(view, temperature)
    if temperature == 1.0:
        teacher = (view.teacher.logprobs_PK, view.teacher.log_tail_P)
        student = (view.student_logprobs_CK, view.student_log_tail_C)
    else:
        teacher, student = _teacher_on_grid(view, temperature), view.tempered(temperature)
    return _with_bucket(view, *teacher), _with_bucket(view, *student)


def num_kept(view: ChunkView) -> int:
    """Return the number of columns that are kept ids, not samples."""
    return view.context.num_kept if view.context.is_sampled else view.teacher.top_k


def log_total(log_CK: Tensor) -> Tensor:
    """Return the log of the sum of probabilities, [C, 1]; if all are 0, `IMPOSSIBLE` with gradient 0."""
    return log_CK.clamp(min=IMPOSSIBLE).logsumexp(1, keepdim=True)


def _vocabulary(view: ChunkView, temperature: float) -> tuple[Tensor, Tensor]:
    teacher_CU, student_CV = view.teacher_logits_CU, view.logits_CV
    if temperature != 1.0:
        teacher_CU, student_CV = teacher_CU / temperature, student_CV / temperature
    num_extra = student_CV.shape[1] - teacher_CU.shape[1]
    teacher_CU = teacher_CU.log_softmax(1)
    # Ids beyond the teacher's vocabulary have probability 0.
    return pad(teacher_CU, (0, num_extra), value=-torch.inf) if num_extra else teacher_CU, student_CV.log_softmax(1)


def _teacher_on_grid(view: ChunkView, temperature: float) -> tuple[Tensor, Tensor]:
    column = view.context.grid_index(temperature)
    assert column is not None
    log_tail_C = view.teacher.require("log_tails_PG")[:, column]
    # The tail has the stored mass; the rest is distributed over the kept ids as softmax(z / T) does.
    kept_CK = view.teacher.logprobs_PK[:, : num_kept(view)] / temperature
    return kept_CK.log_softmax(1) + torch.log1p(-log_tail_C.exp())[:, None], log_tail_C


def _with_bucket(view: ChunkView, logprobs_CK: Tensor, log_tail_C: Tensor | None) -> Tensor:
    if view.covers_vocabulary:
        return logprobs_CK
    assert log_tail_C is not None
    kept, bucket_C1 = num_kept(view), log_tail_C[:, None]
    if logprobs_CK.shape[1] > kept:
        bucket_C1 = log_total(torch.cat([logprobs_CK[:, kept:], bucket_C1], 1))
    return torch.cat([logprobs_CK[:, :kept], bucket_C1], 1)


def decoupled_kl(view: ChunkView, temperature: float) -> Tensor:
    """Return KL of (kept ids, tail) at temperature 1 + mass of the kept ids x T^2 x KL among them at T, [C].

    Equals `tails.bucket_kl` at temperature 1 (chain rule of the KL), which is then cheaper.
    """
    teacher_log_head_C = view.teacher.logprobs_PK.logsumexp(1)
    split_C = kl_terms(teacher_log_head_C, view.student_log_head_C) + tail_term(view)
    teacher_CK = among_kept(view.teacher.logprobs_PK, temperature)
    # A student may give all kept ids -inf: the lowest finite number has a gradient, a whole row of -inf has none.
    student_CK = among_kept(view.student_logits_CK, temperature, torch.finfo(teacher_CK.dtype).min)
    return chain_rule(split_C, teacher_log_head_C, kl_terms(teacher_CK, student_CK).sum(1), temperature)


def chain_rule(split_C: Tensor, log_mass_C: Tensor, among_C: Tensor, temperature: float) -> Tensor:
    """Join the two halves of a decoupled divergence, [C]: the split + mass of the kept ids x T^2 x among them.

    ``split_C`` is the divergence of (kept ids, tail) at temperature 1, ``among_C`` that among the kept ids at T.
    ``log_mass_C`` is the log mass of the kept ids, of the distribution whose expectation the divergence is.
    """
    return split_C + log_mass_C.exp() * temperature**2 * among_C


def among_kept(logits_CK: Tensor, temperature: float, lowest: float | None = None) -> Tensor:
    """Return log-probabilities among the kept ids at a temperature, [C, K]; logits count as ``lowest`` at least."""
    softened_CK = logits_CK / temperature
    return (softened_CK if lowest is None else softened_CK.clamp(min=lowest)).log_softmax(1)


def grid_kl(view: ChunkView, temperature: float) -> Tensor:
    """Return T^2 x KL over the kept ids and the tail bucket, both models at a temperature of the cache's grid, [C]."""
    return temperature**2 * kl_terms(*outcomes(view, "grid", temperature)).sum(1)


def full_kl(view: ChunkView, temperature: float) -> Tensor:
    """Return T^2 x KL over the whole vocabulary, both models at temperature T, [C]; the exact KL at T = 1."""
    values_C: Tensor = _FullKL.apply(view.logits_CV, view.teacher_logits_CU, temperature)
    return values_C


class _FullKL(torch.autograd.Function):
    """T^2 KL(softmax(z / T) || softmax(x / T)) [C] of student logits x [C, V] and teacher logits z [C, U], U <= V.

    Ids beyond U have probability 0 in the teacher. The gradient, T (p - t), is computed in the forward, in place; that
    of autograd would keep both distributions and their difference. The backward scales it in place, so it can run only
    once.
    """

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, teacher_logits_CU: Tensor, temperature: float) -> Tensor:
        log_t_CU, log_p_CV = _log_softmax(teacher_logits_CU, temperature), _log_softmax(logits_CV, temperature)
        t_CU = log_t_CU.exp()
        num_ids = t_CU.shape[1]
        # An id of probability 0 in the teacher contributes 0, although log t is then -inf.
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
