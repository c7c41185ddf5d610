"""Scores of every position from one pass over the logits, for evaluation.

Evaluation needs cross-entropy, divergence from the teacher, the student's top-1 token and its confidence at the same
positions. Each needs the [P, V] logits, which are too large to keep, so all are computed in one pass in chunks. Nothing
is masked or averaged here: every position gets its values, and the caller selects those that count.

Shape suffixes: P flat positions, C positions of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.losses.base import Loss
from kdcache.losses.kernel import at_least_float32, chunks, default_chunk_positions, in_compute_dtype
from kdcache.losses.objective import Objective, check_ids, check_positions
from kdcache.losses.teacher import TeacherContext, TeacherRows
from kdcache.losses.view import ChunkView
from kdcache.models.lm_head import LMHead


@dataclass(frozen=True)
class PositionScores:
    """Values of P positions: each loss by name (nats), the gold token's log-probability, the top-1 tokens.

    ``top1_prob_P`` is the student's probability of ``top1_ids_P``: its confidence. ``teacher_top1_P`` is the teacher's
    top-1 token: the first kept id, or the most frequent sample if none are kept.
    """

    losses: dict[str, Tensor]
    gold_logprob_P: Tensor
    top1_ids_P: Tensor
    top1_prob_P: Tensor
    teacher_top1_P: Tensor


@torch.no_grad()
def score_positions(
    hidden_PD: Tensor,
    head: LMHead,
    teacher: TeacherRows,
    losses: Mapping[str, Loss],
    *,
    chunk_positions: int | None = None,
    context: TeacherContext | None = None,
) -> PositionScores:
    """Return the unweighted values of ``losses`` and the student's predictions at every position, masked or not.

    Values are float32, or float64 for a float64 student. Selections are ignored, and schedules have the values of the
    end of a run. Raises ``StudentError`` if the rows do not match the student, ``ConfigError`` if a loss is
    incompatible with a cache of this ``context`` (default: top-k).
    """
    context = (context if context is not None else TeacherContext()).to(hidden_PD.device)
    for name, loss in losses.items():
        loss.check(context, name)
    losses = {name: loss.at(1.0) for name, loss in losses.items()}
    check_positions(hidden_PD, teacher)
    check_ids(head, teacher, context)
    hidden_PD, head = in_compute_dtype(hidden_PD, head)
    size = chunk_positions or default_chunk_positions(hidden_PD.device, head.vocab_size)
    scores = _empty_scores(hidden_PD, losses)
    with torch.autocast(hidden_PD.device.type, enabled=False):
        for rows, hidden_CD, chunk_teacher in chunks(hidden_PD, teacher, size):
            view = ChunkView(at_least_float32(head.logits(hidden_CD)), chunk_teacher, context)
            _fill(scores, rows, view, losses)
    return scores


def per_position_values(
    hidden_PD: Tensor, head: LMHead, teacher: TeacherRows, objective: Objective
) -> dict[str, Tensor]:
    """Return the unweighted value of each loss of ``objective`` at every position, [P] each, without gradients.

    Temperatures are those at ``objective.progress``.
    """
    chunk_positions, context = objective.chunk_positions, objective.context
    scores = score_positions(
        hidden_PD, head, teacher, objective.losses, chunk_positions=chunk_positions, context=context
    )
    return scores.losses


def _empty_scores(hidden_PD: Tensor, losses: Mapping[str, Loss]) -> PositionScores:
    values_P = at_least_float32(hidden_PD.new_empty(hidden_PD.shape[0]))
    return PositionScores(
        losses={name: torch.empty_like(values_P) for name in losses},
        gold_logprob_P=torch.empty_like(values_P),
        top1_ids_P=torch.empty_like(values_P, dtype=torch.int64),
        top1_prob_P=torch.empty_like(values_P),
        teacher_top1_P=torch.empty_like(values_P, dtype=torch.int64),
    )


def _fill(scores: PositionScores, rows: slice, view: ChunkView, losses: Mapping[str, Loss]) -> None:
    for name, loss in losses.items():
        scores.losses[name][rows] = loss.values(view)
    top_logit_C, top_ids_C = view.logits_CV.max(1)
    scores.gold_logprob_P[rows] = view.gold_logprob_C
    scores.top1_ids_P[rows] = top_ids_C
    scores.top1_prob_P[rows] = (top_logit_C - view.lse_C).exp()
    scores.teacher_top1_P[rows] = _teacher_top1(view)


def _teacher_top1(view: ChunkView) -> Tensor:
    if view.context.kind == "sampled":  # in any order
        best_C1 = view.teacher.logprobs_PK.argmax(1, keepdim=True)
        return view.teacher.ids_PK.gather(1, best_C1).squeeze(1)
    return view.teacher.ids_PK[:, 0]
