"""The same maths written densely: full [P, V] log-softmax, Python loop over rows, float64, plain autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.losses import LOSSES, CrossEntropy, ForwardKL, ObjectiveConfig, TeacherRows
from kdcache.models.lm_head import LMHead


@dataclass(frozen=True)
class Case:
    hidden_PD: Tensor
    head: LMHead
    teacher_logits_PV: Tensor
    rows: TeacherRows

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


def teacher_rows(teacher_logits_PV: Tensor, top_k: int, labels_P: Tensor, mask_P: Tensor | None = None) -> TeacherRows:
    logprobs_PV = teacher_logits_PV.log_softmax(1)
    logprobs_PK, ids_PK = logprobs_PV.topk(top_k)
    outside_PV = logprobs_PV.scatter(1, ids_PK, -torch.inf)
    return TeacherRows(
        ids_PK,
        logprobs_PK,
        outside_PV.logsumexp(1),
        -(logprobs_PV.exp() * logprobs_PV).sum(1),
        labels_P,
        torch.ones_like(labels_P, dtype=torch.bool) if mask_P is None else mask_P,
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
    return Case(normal(num_positions, width).to(dtype).requires_grad_(), head, teacher_logits_PV, rows)


def dense_values(case: Case, loss: object) -> Tensor:
    """Value of ``loss`` at every position, [P], from float64 logits of the whole batch."""
    rows = case.rows
    student_PV = dense_logits(case).log_softmax(1)
    values = []
    for row in range(rows.num_positions):
        inside = rows.ids_PK[row]
        outside = torch.ones(student_PV.shape[1], dtype=torch.bool)
        outside[inside] = False
        if isinstance(loss, CrossEntropy):
            values.append(-student_PV[row, rows.labels_P[row]])
        elif isinstance(loss, ForwardKL):
            log_t, log_p = rows.logprobs_PK[row].double(), student_PV[row]
            tail_t = rows.log_tail_P[row].double().exp()
            tail_p = log_p[outside].exp().sum()
            values.append(_dense_kl(log_t.exp(), tail_t, log_p[inside].exp(), tail_p, loss.temperature))
        else:
            raise AssertionError(f"the oracle does not know {loss!r}: write its formula here, densely")
    return torch.stack(values) if values else student_PV.new_zeros(0)


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
        t, p = torch.cat([t_K, t_tail[None]]), torch.cat([p_K, p_tail[None]])
        return (t * (t / p).log())[t > 0].sum()
    # Tempering probabilities: p^(1/T), normalised, is softmax(x / T).
    soft_t, soft_p = t_K ** (1 / temperature), p_K ** (1 / temperature)
    soft_t, soft_p = soft_t / soft_t.sum(), soft_p / soft_p.sum()
    split = t_K.sum() * (t_K.sum() / p_K.sum()).log()
    if t_tail > 0:
        split = split + t_tail * (t_tail / p_tail).log()
    return split + t_K.sum() * temperature**2 * (soft_t * (soft_t / soft_p).log())[soft_t > 0].sum()


def dense_loss(case: Case, config: ObjectiveConfig, num_valid: float) -> Tensor:
    mask_P = case.rows.loss_mask_P
    total = sum(loss.weight * dense_values(case, loss)[mask_P].sum() for loss in config.losses.values())
    return total / num_valid


def every_loss() -> list[object]:
    """One instance of every row of the table, with a second temperature where there is one."""
    found: list[object] = [loss(weight=1.0) for loss in LOSSES.values()]
    found += [loss(weight=1.0, temperature=2.5) for loss in LOSSES.values() if "temperature" in loss.model_fields]
    assert len(LOSSES) >= 2
    assert len(found) > len(LOSSES)
    return found
