"""Teacher and student as two distributions over the same outcomes, for losses that are sums over outcomes.

The outcomes are the whole vocabulary where the teacher's logits can be made, otherwise its kept ids and one bucket for
everything else: an exact coarsening of both distributions. An f-divergence of a coarsened pair is a lower bound of the
full one, and grows as ids are added.

Behind the kept ids of a hybrid cache stand samples, which share the tail's mass: they go back into the bucket, so that
nothing is an estimate. Places of ragged rows that stand for nothing are outcomes of probability 0 on both sides. There
is no bucket where the kept ids are the whole vocabulary.

Shape suffixes: C positions of a chunk, K kept ids, O outcomes, V the student's vocabulary, U the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdcache.losses.modes import Mode
from kdcache.losses.view import ChunkView

IMPOSSIBLE = -1e30
"""A logarithm of 0 that sums can be differentiated at, unlike -inf; differences of two stay finite in float32."""


def outcomes(view: ChunkView, mode: Mode, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of teacher and student at ``temperature``, [C, O] each.

    What is at most `IMPOSSIBLE` (-inf too) stands for a probability of 0. In mode ``decoupled``, which tempers among
    the kept ids only, ask for temperature 1.
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
    """Return how many columns of the rows are kept ids: all but samples."""
    return view.context.num_kept if view.context.is_sampled else view.teacher.top_k


def log_total(log_CK: Tensor) -> Tensor:
    """Return the logarithm of the sum of probabilities, [C, 1]; where all are 0, `IMPOSSIBLE` with gradient 0."""
    return log_CK.clamp(min=IMPOSSIBLE).logsumexp(1, keepdim=True)


def _vocabulary(view: ChunkView, temperature: float) -> tuple[Tensor, Tensor]:
    teacher_CU, student_CV = view.teacher_logits_CU, view.logits_CV
    if temperature != 1.0:
        teacher_CU, student_CV = teacher_CU / temperature, student_CV / temperature
    num_extra = student_CV.shape[1] - teacher_CU.shape[1]
    teacher_CU = teacher_CU.log_softmax(1)
    # The teacher gives nothing to ids beyond its vocabulary.
    return pad(teacher_CU, (0, num_extra), value=-torch.inf) if num_extra else teacher_CU, student_CV.log_softmax(1)


def _teacher_on_grid(view: ChunkView, temperature: float) -> tuple[Tensor, Tensor]:
    column = view.context.grid_index(temperature)
    assert column is not None
    log_tail_C = view.teacher.require("log_tails_PG")[:, column]
    # The tail's mass is what was stored; the kept ids share the rest as softmax(z / T) shares it among them.
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
