"""Sample from the teacher's distribution, by inverting its cumulative sum in two levels.

A cumulative sum over the whole vocabulary costs ten times a plain sum, and only a few of its values are read. So the
vocabulary is summed in blocks; a uniform number finds its block among the sums of blocks, and its id in the cumulative
sum of that block alone. Both levels count in integers: each weight becomes a number of 2^-50ths of the total, rounded
down, so sums are exact and ascend on every device, in whatever order it adds. A weight of 0 becomes 0 steps, so
rounding cannot choose it either.

Uniform numbers come from a counter-based generator, one stream per (seed, sequence), so a sequence gets the same
samples in every batch and on every machine. They are made from the generator's raw integers, which NumPy promises not
to change, unlike its distributions.

For one sample from each of many short rows `torch.multinomial` does as well.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.schema import IntArray, Samples

#: Ids of a block: with 32 to 64, the sums of all blocks and the search in the chosen ones cost least together.
_BLOCK = 64
#: Steps of a total: sums of rounded shares stay far below 2^53, up to which float64 is exact.
_STEPS = 2.0**50


def sample_uniforms(
    seed: int, sequence_indices: SequenceOf[int] | IntArray, lengths: SequenceOf[int] | IntArray, num_samples: int
) -> NDArray[np.float64]:
    """Return ``num_samples`` numbers in [0, 1) for every position of some sequences, [P, N].

    Sequence ``sequence_indices[n]`` has ``lengths[n]`` rows, which depend on ``seed`` (below 2^64), on its index and
    on nothing else. Generator: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """
    parts = [
        np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(int(length) * num_samples)
        for index, length in zip(sequence_indices, lengths, strict=True)
    ]
    raw = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
    uniforms = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms.reshape(int(np.sum(lengths)), num_samples)


def sample_ids(weights_CV: Tensor, uniforms_CN: Tensor) -> Tensor:
    """Return the ids [C, N] that uniform numbers choose, each with a probability proportional to its weight.

    Weights are float32, not negative, not necessarily normalised; an id of weight 0 is never chosen. The ids of a row
    of zeros mean nothing. Probabilities are exact up to float32's rounding of the sum of a block.
    """
    vocab_size = weights_CV.shape[1]
    whole = vocab_size - vocab_size % _BLOCK
    sums_CB = weights_CV[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)).sum(2)
    if whole < vocab_size:
        sums_CB = torch.cat([sums_CB, weights_CV[:, whole:].sum(1, keepdim=True)], 1)
    blocks_CN, within_CN = _invert(sums_CB, uniforms_CN)
    first_CN = blocks_CN * _BLOCK
    ids_CNS = first_CN[:, :, None] + torch.arange(_BLOCK, device=weights_CV.device)
    chosen_CNS = weights_CV.gather(1, ids_CNS.flatten(1).clamp(max=vocab_size - 1)).view(ids_CNS.shape)
    if whole < vocab_size:
        chosen_CNS.masked_fill_(ids_CNS >= vocab_size, 0)
    index_CN1, _ = _invert(chosen_CNS, within_CN[:, :, None])
    return first_CN + index_CN1[:, :, 0]


def _invert(weights_XS: Tensor, uniforms_XN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices on which uniform numbers fall, and the position within each, in [0, 1)."""
    totals_X1 = weights_XS.sum(-1, keepdim=True, dtype=torch.float64)
    scales_X1 = _STEPS / totals_X1.clamp(min=1e-45)  # below every float32 but 0
    steps_XS = (weights_XS * scales_X1).long()
    ends_XS = steps_XS.cumsum(-1)
    sought_XN = torch.minimum((uniforms_XN * ends_XS[..., -1:]).long(), ends_XS[..., -1:] - 1)
    # Only NaN can be out of range here; it is reported when the whole batch has been reduced.
    index_XN = torch.searchsorted(ends_XS, sought_XN, right=True).clamp_(max=weights_XS.shape[-1] - 1)
    steps_XN = steps_XS.gather(-1, index_XN)
    passed_XN = sought_XN - (ends_XS.gather(-1, index_XN) - steps_XN)
    return index_XN, passed_XN.double() / steps_XN.clamp(min=1)


def count_samples(ids_PN: IntArray, is_empty_P: NDArray[np.bool_]) -> Samples:
    """Return the distinct ids of each row and how often each occurs, the most frequent first, then by id.

    Rows of ``is_empty_P`` have no samples. The result is as wide as the row with the most distinct ids.
    """
    num_rows, num_samples = ids_PN.shape
    flat = np.sort(ids_PN.astype(np.int64), axis=1).reshape(-1)
    begins = np.empty((num_rows, num_samples), dtype=bool)
    begins[:, :1] = True
    begins[:, 1:] = np.diff(flat.reshape(num_rows, num_samples), axis=1) != 0
    starts_R = np.flatnonzero(begins)
    counts_R = np.diff(starts_R, append=flat.size)
    rows_R = starts_R // max(num_samples, 1)
    # Row, descending count and id in one integer: sorting it is several times faster than sorting by three keys.
    keys_R = ((rows_R * (num_samples + 1) + num_samples - counts_R) << 32) | flat[starts_R]
    keys_R = np.sort(keys_R[~is_empty_P[rows_R]])
    rows_R, rank_R = np.divmod(keys_R >> 32, num_samples + 1)
    columns_R = np.arange(len(rows_R)) - np.searchsorted(rows_R, rows_R)
    width = int(columns_R.max(initial=-1)) + 1
    samples = Samples(np.zeros((num_rows, width), np.int32), np.zeros((num_rows, width), np.int32))
    samples.ids_PJ[rows_R, columns_R] = keys_R & 0xFFFFFFFF
    samples.counts_PJ[rows_R, columns_R] = num_samples - rank_R
    return samples
