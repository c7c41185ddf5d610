"""The same maths written densely: full [P, V] log-softmax, Python loop over rows, float64, plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.losses import LOSSES, CrossEntropy, ForwardKL, Loss, ObjectiveConfig, TeacherContext, TeacherRows
from kdcache.losses.divergences import (
    JensenShannon,
    LogitsMSE,
    Ranking,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from kdcache.losses.tails import TAILS
from kdcache.models.lm_head import LMHead

#: Temperatures at which the rows of every case store the mass of their tail.
GRID = (0.5, 2.5)


@dataclass(frozen=True)
class Case:
    hidden_PD: Tensor
    head: LMHead
    teacher_logits_PV: Tensor
    rows: TeacherRows
    context: TeacherContext

    def context_for(self, losses: ObjectiveConfig | object) -> TeacherContext:
        """The context, with the teacher's head where one of the losses wants the whole vocabulary, else without.

        The head is the identity unless the case has one, because the rows' hidden states are the teacher's logits.
        """
        given = losses.losses.values() if isinstance(losses, ObjectiveConfig) else [losses]
        if not any(getattr(loss, "mode", None) == "full" for loss in given):
            return replace(self.context, head=None)
        if self.context.head is not None:
            return self.context
        width = self.teacher_logits_PV.shape[1]
        return replace(self.context, head=LMHead(torch.eye(width, dtype=self.teacher_logits_PV.dtype)))

    def leaves(self) -> list[Tensor]:
        found = [self.hidden_PD, self.head.weight_VD, self.head.bias_V]
        return [tensor for tensor in found if tensor is not None and tensor.requires_grad]

    def to(self, dtype: torch.dtype) -> Case:
        """A copy with new leaves; the teacher's rows stay as they are."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

        bias_V = None if self.head.bias_V is None else leaf(self.head.bias_V)
        head = replace(self.head, weight_VD=leaf(self.head.weight_VD), bias_V=bias_V)
        return replace(self, hidden_PD=leaf(self.hidden_PD), head=head)


def teacher_rows(
    teacher_logits_PV: Tensor,
    top_k: int,
    labels_P: Tensor,
    mask_P: Tensor | None = None,
    num_kept_P: Tensor | None = None,
) -> TeacherRows:
    """What a cache keeps of the logits; with ``num_kept_P`` row p keeps that many ids and is padded."""
    logprobs_PV = teacher_logits_PV.log_softmax(1)
    logprobs_PK, ids_PK = logprobs_PV.topk(top_k)
    if num_kept_P is not None:
        pads_PK = torch.arange(top_k) >= num_kept_P[:, None]
        ids_PK = torch.where(pads_PK, ids_PK[:, :1], ids_PK)
        logprobs_PK = logprobs_PK.masked_fill(pads_PK, -torch.inf)
    tails = [(teacher_logits_PV / t).log_softmax(1).scatter(1, ids_PK, -torch.inf).logsumexp(1) for t in (1.0, *GRID)]
    return TeacherRows(
        ids_PK,
        logprobs_PK,
        tails[0],
        -(logprobs_PV.exp() * logprobs_PV).sum(1),
        labels_P,
        torch.ones_like(labels_P, dtype=torch.bool) if mask_P is None else mask_P,
        torch.stack(tails[1:], 1),
        teacher_logits_PV,
        logprobs_PV.gather(1, labels_P[:, None]).squeeze(1),
    )


def make_case(
    num_positions: int = 13,
    vocab_size: int = 31,
    width: int = 5,
    top_k: int = 6,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    masked: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Case:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(shape, generator=random, dtype=torch.float64)

    mask_P = torch.rand(num_positions, generator=random) < 0.7 if masked else None
    head = LMHead(
        normal(vocab_size, width).to(dtype).requires_grad_(),
        normal(vocab_size).to(dtype).requires_grad_() if bias else None,
        scale,
        softcap,
    )
    teacher_logits_PV = normal(num_positions, vocab_size, spread=2.0)
    labels_P = torch.randint(vocab_size, (num_positions,), generator=random)
    rows = teacher_rows(teacher_logits_PV, top_k, labels_P, mask_P)
    hidden_PD = normal(num_positions, width).to(dtype).requires_grad_()
    prior_V = 0.2 * normal(vocab_size, spread=2.0).softmax(0)
    return Case(hidden_PD, head, teacher_logits_PV, rows, TeacherContext("top-k", vocab_size, False, GRID, prior_V))


def with_teacher_head(
    case: Case, width: int = 6, *, scale: float = 1.0, softcap: float | None = None, dtype: torch.dtype = torch.float64
) -> Case:
    """The case with a teacher that is a hidden state and a head, whose logits are made as a live teacher makes them."""
    random = torch.Generator().manual_seed(9)
    num_positions, vocab_size = case.teacher_logits_PV.shape
    hidden_PD, weight_VD, bias_V = (
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        for shape in ((num_positions, width), (vocab_size, width), (vocab_size,))
    )
    head = LMHead(weight_VD, bias_V, scale, softcap)
    logits_PV = head.logits(hidden_PD).double()
    rows = teacher_rows(logits_PV, case.rows.top_k, case.rows.labels_P, case.rows.loss_mask_P)
    rows = replace(rows, hidden_PD=hidden_PD.float() if dtype != torch.float64 else hidden_PD)
    return replace(case, teacher_logits_PV=logits_PV, rows=rows, context=replace(case.context, head=head))


def ragged_case(num_kept_P: Tensor, top_k: int = 8, **settings: Any) -> Case:
    """A case whose row p keeps ``num_kept_P[p]`` ids."""
    case = make_case(num_positions=len(num_kept_P), top_k=top_k, masked=False, **settings)
    rows = teacher_rows(case.teacher_logits_PV, top_k, case.rows.labels_P, None, num_kept_P)
    return replace(case, rows=rows, context=replace(case.context, is_ragged=True))


def hybrid_case(top_k: int = 4, num_samples: int = 9, **settings: Any) -> Case:
    """A case whose rows keep ``top_k`` ids and samples of the tail, which share its mass; the last row drew nothing."""
    case = make_case(top_k=top_k, **settings)
    rows = case.rows
    random = torch.Generator().manual_seed(4)
    outside_PV = case.teacher_logits_PV.softmax(1).scatter(1, rows.ids_PK, 0.0)
    sampled_PN = outside_PV.multinomial(num_samples, replacement=True, generator=random)
    counts_PV = torch.zeros_like(outside_PV).scatter_add(
        1, sampled_PN, torch.ones_like(sampled_PN, dtype=torch.float64)
    )
    counts_PJ, ids_PJ = counts_PV.topk(num_samples)
    counts_PJ[-1] = 0
    sampled_PJ = rows.log_tail_P[:, None] + (counts_PJ / num_samples).log()
    assert bool((counts_PJ == 0).any()), "there are pads"
    ids_PJ = torch.where(counts_PJ > 0, ids_PJ, rows.ids_PK[:, :1])
    log_tail_P = torch.where(counts_PJ.sum(1) > 0, -torch.inf, rows.log_tail_P)
    rows = replace(
        rows,
        ids_PK=torch.cat([rows.ids_PK, ids_PJ], 1),
        logprobs_PK=torch.cat([rows.logprobs_PK, sampled_PJ], 1),
        log_tail_P=log_tail_P,
    )
    return replace(case, rows=rows, context=replace(case.context, kind="hybrid", num_kept=top_k))


def dense_values(case: Case, loss: object) -> Tensor:
    """Value of ``loss`` at every position, [P], from float64 logits of the whole batch."""
    logits_PV = dense_logits(case)
    rows = case.rows
    values = []
    for row in range(rows.num_positions):
        if isinstance(loss, CrossEntropy):
            values.append(-logits_PV[row].log_softmax(0)[rows.labels_P[row]])
        elif isinstance(loss, ForwardKL):
            values.append(_dense_forward_kl(case, loss, logits_PV[row], row))
        elif isinstance(loss, LogitsMSE | Ranking):
            values.append(_dense_kept(loss, *_kept_logits(case, logits_PV[row], row)))
        elif isinstance(loss, ReverseKL) and loss.temperature != 1.0 and loss.mode in (None, "decoupled"):
            values.append(_dense_decoupled_reverse_kl(loss, *_dense_pair(case, loss, logits_PV[row], row)))
        elif type(loss) in PAIRWISE:
            pair = _dense_pair(case, loss, logits_PV[row], row)
            factor = loss.temperature if isinstance(loss, TotalVariation) else loss.temperature**2
            values.append(factor * PAIRWISE[type(loss)](loss, *pair))
        else:
            raise AssertionError(f"the oracle does not know {loss!r}: write its formula here, densely")
    return torch.stack(values) if values else logits_PV.new_zeros(0)


def _dense_forward_kl(case: Case, loss: ForwardKL, logits_V: Tensor, row: int) -> Tensor:
    rows, temperature = case.rows, loss.temperature
    if loss.mode == "full":
        t, p = (case.teacher_logits_PV[row] / temperature).softmax(0), (logits_V / temperature).softmax(0)
        return temperature**2 * _kl(t, p)
    kept = torch.ones_like(rows.ids_PK[row], dtype=torch.bool)
    if case.context.has_pads:
        kept = rows.logprobs_PK[row] > -torch.inf
    ids, t_K = rows.ids_PK[row][kept], rows.logprobs_PK[row][kept].double().exp()
    outside = torch.ones(len(logits_V), dtype=torch.bool).index_fill(0, ids, False)
    tail_t = rows.log_tail_P[row].double().exp()
    if loss.mode == "grid" and temperature != 1.0:
        assert rows.log_tails_PG is not None
        tail_t = rows.log_tails_PG[row, GRID.index(temperature)].exp()
        t_K = t_K ** (1 / temperature)
        t_K, p_V = t_K / t_K.sum() * (1 - tail_t), (logits_V / temperature).softmax(0)
        t, p = torch.cat([t_K, tail_t[None]]), torch.cat([p_V[ids], p_V[outside].sum()[None]])
        return temperature**2 * _kl(t, p)
    p_V = logits_V.softmax(0)
    if loss.tail == "bucket":
        return _dense_kl(t_K, tail_t, p_V[ids], p_V[outside].sum(), temperature)
    return _kl(dense_target(case, loss.tail, row), p_V)


def dense_target(case: Case, tail: str, row: int) -> Tensor:
    """What a student learns under a treatment of the tail other than the bucket, over the whole vocabulary, [V]."""
    rows = case.rows
    kept = rows.logprobs_PK[row] > -torch.inf if case.context.has_pads else slice(None)
    ids, t_K = rows.ids_PK[row][kept], rows.logprobs_PK[row][kept].double().exp()
    weights_V = torch.ones(case.head.vocab_size, dtype=torch.float64)
    if tail == "prior":
        assert case.context.prior_V is not None
        weights_V = case.context.prior_V.double()
    weights_V = weights_V.index_fill(0, ids, 0)
    if tail in ("renormalise", "drop"):
        target_V, t_K = torch.zeros_like(weights_V), t_K / t_K.sum() if tail == "renormalise" else t_K
    elif weights_V.sum() == 0:
        target_V = weights_V
    else:
        target_V = rows.log_tail_P[row].double().exp() * weights_V / weights_V.sum()
    return target_V.index_copy(0, ids, t_K)


def _dense_pair(case: Case, loss: Any, logits_V: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Probabilities of teacher and student: over the vocabulary, or of the kept ids and all others together."""
    rows, temperature = case.rows, 1.0 if loss.mode in (None, "decoupled") else loss.temperature
    p_V = (logits_V / temperature).softmax(0)
    if loss.mode == "full":
        t = (case.teacher_logits_PV[row] / temperature).softmax(0)
        return torch.cat([t, t.new_zeros(len(p_V) - len(t))]), p_V
    ids = _kept_ids(case, row)
    t_K, tail_t = rows.logprobs_PK[row][: len(ids)].double().exp(), 1 - rows.logprobs_PK[row][: len(ids)].exp().sum()
    outside = torch.ones(len(logits_V), dtype=torch.bool).index_fill(0, ids, False)
    if temperature != 1.0:
        assert rows.log_tails_PG is not None
        tail_t, t_K = rows.log_tails_PG[row, GRID.index(temperature)].exp(), t_K ** (1 / temperature)
        t_K = t_K / t_K.sum() * (1 - tail_t)
    elif not case.context.is_sampled:
        tail_t = rows.log_tail_P[row].exp()
    return torch.cat([t_K, tail_t[None]]), torch.cat([p_V[ids], p_V[outside].sum()[None]])


def _kept_ids(case: Case, row: int) -> Tensor:
    rows = case.rows
    if case.context.is_sampled:
        return rows.ids_PK[row, : case.context.num_kept]
    return rows.ids_PK[row][rows.logprobs_PK[row] > -torch.inf] if case.context.has_pads else rows.ids_PK[row]


def _dense_decoupled_reverse_kl(loss: ReverseKL, t: Tensor, p: Tensor) -> Tensor:
    (t_K, p_K), (tail_t, tail_p) = (t[:-1], p[:-1]), (t[-1], p[-1])
    split = _reverse_kl(torch.stack([t_K.sum(), tail_t]), torch.stack([p_K.sum(), tail_p]))
    soft_t, soft_p = t_K ** (1 / loss.temperature), p_K ** (1 / loss.temperature)
    return split + p_K.sum() * loss.temperature**2 * _reverse_kl(soft_t / soft_t.sum(), soft_p / soft_p.sum())


def _reverse_kl(t: Tensor, p: Tensor) -> Tensor:
    # A teacher's probability counts as e^-104 at least.
    return _kl(p, t.clamp(min=math.exp(-104)))


def _jensen_shannon(loss: JensenShannon, t: Tensor, p: Tensor) -> Tensor:
    if loss.beta in (0, 1):
        return _kl(t, p) if loss.beta == 0 else _reverse_kl(t, p)
    mixed = loss.beta * t + (1 - loss.beta) * p
    return loss.beta * _kl(t, mixed) + (1 - loss.beta) * _kl(p, mixed)


#: What each loss between two distributions t and p is.
PAIRWISE: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    ReverseKL: lambda _, t, p: _reverse_kl(t, p),
    JensenShannon: _jensen_shannon,
    TotalVariation: lambda _, t, p: (t - p).abs().sum() / 2,
    SkewKL: lambda loss, t, p: _kl(t, loss.alpha * t + (1 - loss.alpha) * p),
    SkewReverseKL: lambda loss, t, p: _kl(p, (1 - loss.alpha) * t + loss.alpha * p),
}


def _kept_logits(case: Case, logits_V: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Logits of teacher and student at the kept ids that both give some probability."""
    ids = _kept_ids(case, row)
    z, x = case.rows.logprobs_PK[row][: len(ids)].double(), logits_V[ids]
    known = z.isfinite() & x.isfinite()
    return z[known], x[known]


def _dense_kept(loss: LogitsMSE | Ranking, z: Tensor, x: Tensor) -> Tensor:
    if isinstance(loss, LogitsMSE):
        return ((x - x.mean()) - (z - z.mean())).square().mean()
    order = z.argsort(descending=True, stable=True)[: loss.top_k]
    chosen = [-x[order[place:]].log_softmax(0)[0] for place in range(len(order) - 1)]
    return torch.stack(chosen).mean() if chosen else 0 * x.sum()


def _kl(t: Tensor, p: Tensor) -> Tensor:
    t, p = t[t > 0], p[: len(t)][t > 0]  # ids beyond the teacher's vocabulary get nothing
    return (t * (t / p).log()).sum()


def dense_logits(case: Case) -> Tensor:
    logits_PV = case.hidden_PD.double() @ case.head.weight_VD.double().T
    if case.head.bias_V is not None:
        logits_PV = logits_PV + case.head.bias_V.double()
    logits_PV = logits_PV * case.head.scale
    if case.head.softcap is not None:
        logits_PV = case.head.softcap * torch.tanh(logits_PV / case.head.softcap)
    return logits_PV


def _dense_kl(t_K: Tensor, t_tail: Tensor, p_K: Tensor, p_tail: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return _kl(torch.cat([t_K, t_tail[None]]), torch.cat([p_K, p_tail[None]]))
    # Tempering probabilities: p^(1/T), normalised, is softmax(x / T).
    soft_t, soft_p = t_K ** (1 / temperature), p_K ** (1 / temperature)
    soft_t, soft_p = soft_t / soft_t.sum(), soft_p / soft_p.sum()
    split = t_K.sum() * (t_K.sum() / p_K.sum()).log()
    if t_tail > 0:
        split = split + t_tail * (t_tail / p_tail).log()
    return split + t_K.sum() * temperature**2 * _kl(soft_t, soft_p)


def dense_loss(case: Case, config: ObjectiveConfig, num_valid: float) -> Tensor:
    mask_P = case.rows.loss_mask_P
    total = sum(loss.weight * dense_values(case, loss)[mask_P].sum() for loss in config.losses.values())
    return total / num_valid


def forward_kls() -> list[Loss]:
    """The forward KL in every mode and with every tail."""
    found = [ForwardKL(weight=1.0, tail=tail) for tail in TAILS]
    found += [ForwardKL(weight=1.0, mode=mode, temperature=2.5) for mode in ("decoupled", "grid", "full")]
    found += [ForwardKL(weight=1.0, mode="full"), ForwardKL(weight=1.0, mode="grid", temperature=0.5)]
    assert len(found) == 10
    return list(found)


def other_losses() -> list[Loss]:
    """Every other row of the table, with every mode and parameter that changes the formula."""
    found: list[Loss] = [CrossEntropy(weight=1.0), LogitsMSE(weight=1.0), Ranking(weight=1.0)]
    found += [Ranking(weight=1.0, top_k=3), ReverseKL(weight=1.0, temperature=2.5)]
    found += [JensenShannon(weight=1.0, beta=beta) for beta in (0.0, 0.2, 1.0)]
    found += [skew(weight=1.0, alpha=0.6) for skew in (SkewKL, SkewReverseKL)]
    for divergence in PAIRWISE:
        found += [
            divergence(weight=1.0),
            divergence(weight=1.0, mode="grid", temperature=0.5),
            divergence(weight=1.0, mode="full", temperature=2.5),
            divergence(weight=1.0, mode="full"),
        ]
    assert {ForwardKL, *map(type, found)} == set(LOSSES.values()), "list the settings of the new loss here"
    return found


def every_loss() -> list[Loss]:
    """One instance of every row of the table, and every setting of those that have settings."""
    return [*forward_kls(), *other_losses()]
