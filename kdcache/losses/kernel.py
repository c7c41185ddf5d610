"""Sum all losses over many positions in chunks, without materialising the [P, V] logits.

Training a small model with a large vocabulary spends most of its memory on logits and their gradient. Here each chunk
of positions goes through the LM head, the losses and back *during the forward pass*: the logits of the chunk become its
share of three gradients (hidden states, head weight, head bias) and are freed. The backward pass only multiplies these
gradients by the incoming scalar, so the head product is computed once, not twice as with checkpointing. The cost: the
gradients are computed even if backward is never called, unless gradients are disabled (``no_grad``).

Precision. The head product runs in the dtype of the model, or of an enclosing ``torch.autocast``; softmax, losses and
sums in float32 at least. Head gradients are accumulated over chunks in float32 at least, also for bfloat16 and
float16 heads, because a sum of dozens of chunks loses digits in 8 bits of mantissa; that costs one float32 copy of
the head. The gradient is that of the *sum*, and is divided by the number of positions afterwards: small
probabilities divided early would vanish in float16.

Shape suffixes: P positions, C positions of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcache.losses.base import Loss
from kdcache.losses.teacher import TeacherContext, TeacherRows
from kdcache.losses.view import ChunkView
from kdcache.models.lm_head import LMHead
from kdcache.models.products import hidden_gradient, logits_of

#: On a CPU the arrays of a chunk, three of which are alive at once, should be small enough for the allocator to reuse:
#: the C library returns free memory above 64 MiB to the system, and page faults of new memory cost more than a softmax.
_CPU_CHUNK_BYTES = 20 << 20

#: Elsewhere a chunk should fill the device: 1,024 rows of a vocabulary of 150,000 take 0.6 GB per float32 array.
_DEVICE_CHUNK_POSITIONS = 1024


@dataclass(frozen=True)
class Work:
    """The inputs of a sum: losses by name, the teacher's rows and their context, the head, the chunk size."""

    losses: Mapping[str, Loss]
    teacher: TeacherRows
    head: LMHead
    chunk_positions: int
    context: TeacherContext = field(default_factory=TeacherContext)


def default_chunk_positions(device: torch.device, vocab_size: int) -> int:
    """Return the number of positions per chunk for a head of ``vocab_size`` ids on ``device``."""
    if device.type != "cpu":
        return _DEVICE_CHUNK_POSITIONS
    rows = _CPU_CHUNK_BYTES // (4 * vocab_size)
    return min(max(rows - rows % 16, 32), 512)


def weighted_sum(hidden_PD: Tensor, work: Work) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum over positions and losses of weight x value, and the unweighted, detached sum of each loss.

    Differentiable with respect to ``hidden_PD`` and the parameters of the head, once (no second derivatives).
    """
    inputs = (hidden_PD, work.head.weight_VD, work.head.bias_V)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    total, sums = _WeightedSum.apply(*inputs, work, wanted)
    return total, dict(zip(work.losses, sums.unbind(), strict=True))


def chunks(hidden_PD: Tensor, teacher: TeacherRows, size: int) -> Iterator[tuple[slice, Tensor, TeacherRows]]:
    """Yield the slice, hidden states and teacher's rows of each chunk."""
    for start in range(0, hidden_PD.shape[0], size):
        rows = slice(start, start + size)
        yield rows, hidden_PD[rows], teacher.slice(rows.start, rows.stop)


def in_compute_dtype(hidden_PD: Tensor, head: LMHead) -> tuple[Tensor, LMHead]:
    """Return hidden states and head cast once to the dtype of the head product (autocast's, if one is active).

    Autocast itself would cast in every chunk, and its cache under ``no_grad`` has no gradient for later users of a tied
    weight; so the cast is made here, and autocast is disabled around the chunks.
    """
    dtype, device = head.weight_VD.dtype, hidden_PD.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    return hidden_PD.to(dtype), replace(head, weight_VD=head.weight_VD.to(dtype), bias_V=bias_V)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or unchanged if it is float32 or float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, work: Work, wanted: list[bool]
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden_PD, weight_VD, bias_V)
        gradients = [_accumulator(tensor, i > 0) if wanted[i] else None for i, tensor in enumerate(inputs)]
        sums = _sweep(hidden_PD, work, gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums)
        return _total(work.losses, sums), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            # Into a tensor of the final dtype: no second float32 array of the size of the head.
            None if gradient is None else torch.mul(gradient, grad_total, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None)


def _total(losses: Mapping[str, Loss], sums: Tensor) -> Tensor:
    # Losses of weight 0 are left out, not multiplied: an infinite one would make the total NaN.
    terms = [loss.weight * sums[i] for i, loss in enumerate(losses.values()) if loss.weight > 0]
    return torch.stack(terms).sum() if terms else sums.new_zeros(())


def _accumulator(tensor: Tensor | None, sums_over_chunks: bool) -> Tensor:
    assert tensor is not None
    dtype = torch.promote_types(tensor.dtype, torch.float32) if sums_over_chunks else tensor.dtype
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _sweep(hidden_PD: Tensor, work: Work, gradients: list[Tensor | None]) -> Tensor:
    """Return the sum of each loss; add the gradient of their weighted sum to all ``gradients`` that are not None."""
    hidden_PD, head = in_compute_dtype(hidden_PD, work.head)
    sums = torch.zeros(
        len(work.losses), dtype=torch.promote_types(hidden_PD.dtype, torch.float32), device=hidden_PD.device
    )
    is_trained = any(loss.weight > 0 for loss in work.losses.values())
    wants_gradient = is_trained and any(gradient is not None for gradient in gradients)
    with torch.autocast(hidden_PD.device.type, enabled=False):
        for rows, hidden_CD, teacher in chunks(hidden_PD, work.teacher, work.chunk_positions):
            chunk_sums, grad_CV = _chunk(hidden_CD, head, teacher, work, wants_gradient)
            sums += chunk_sums
            if grad_CV is not None:
                _add_gradients(rows, grad_CV, hidden_CD, head, gradients)
                del grad_CV  # before the next chunk's arrays are made
    return sums


def _chunk(
    hidden_CD: Tensor, head: LMHead, teacher: TeacherRows, work: Work, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of each loss over a chunk and the gradient of the head product, [C, V]."""
    product_CV = logits_of(hidden_CD, head.weight_VD, head.bias_V)
    product_CV.requires_grad_(wants_gradient)
    with torch.set_grad_enabled(wants_gradient):
        view = ChunkView(at_least_float32(head.finish(product_CV)), teacher, work.context)
        sums = torch.stack([loss.selected_values(view).sum() for loss in work.losses.values()])
        if not wants_gradient:
            return sums, None
        (grad_CV,) = torch.autograd.grad(_total(work.losses, sums), product_CV)
    return sums.detach(), grad_CV


def _add_gradients(
    rows: slice, grad_CV: Tensor, hidden_CD: Tensor, head: LMHead, gradients: list[Tensor | None]
) -> None:
    grad_hidden_PD, grad_weight_VD, grad_bias_V = gradients
    if grad_hidden_PD is not None:
        grad_hidden_PD[rows] = hidden_gradient(grad_CV, head.weight_VD)
    if grad_weight_VD is not None:
        if grad_weight_VD.dtype == grad_CV.dtype:
            grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
        else:
            grad_weight_VD += grad_CV.T @ hidden_CD
    if grad_bias_V is not None:
        grad_bias_V += grad_CV.sum(0, dtype=grad_bias_V.dtype)
