from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.errors import TeacherError
from kdcache.teachers import keep_top_k
from kdcache.teachers.keep import NonFiniteLogitsError, top_k_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
#: Sizes on both sides of every block border: small, divisible by 24 and not, prime.
SHAPES = [(7, 1, 1), (5, 3, 3), (9, 4, 50), (4, 1, 24 * 40), (4, 8, 24 * 40 + 1), (33, 8, 997), (3, 64, 24 * 256 + 23)]


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows * vocab_size)
    return (scale * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def labels_for(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(logits)) * 7 % logits.shape[1]


def keep(logits, top_k, labels=None):
    labels = labels_for(logits) if labels is None else labels
    return keep_top_k(lambda start, stop: logits[start:stop], labels, top_k)


def check(targets, logits, top_k, labels=None):
    """Compare with the whole log-softmax in float64."""
    labels = labels_for(logits) if labels is None else labels
    logprobs = logits.double().log_softmax(-1)
    values, _ = logprobs.topk(top_k)
    ids = torch.from_numpy(targets.ids_PK.astype(np.int64))
    assert targets.logprobs_PK.dtype == np.float32
    np.testing.assert_allclose(targets.logprobs_PK, values, rtol=2e-6, atol=2e-6)
    # Which of two equal ids is kept is free; that the kept values belong to the kept ids is not.
    torch.testing.assert_close(logprobs.gather(1, ids), values, rtol=0, atol=0)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    outside = logprobs.scatter(1, ids, -torch.inf)
    np.testing.assert_allclose(targets.log_tail_P, outside.logsumexp(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(targets.gold_logprob_P, logprobs.gather(1, labels[:, None])[:, 0], rtol=2e-6, atol=2e-6)
    terms = torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0)
    np.testing.assert_allclose(targets.entropy_P, -terms.sum(-1), rtol=1e-5, atol=1e-5)


@dtypes
@pytest.mark.parametrize(("num_rows", "top_k", "vocab_size"), SHAPES)
def test_top_k_of_equals_topk_in_values(dtype, num_rows, top_k, vocab_size):
    logits = make_logits(num_rows, vocab_size, dtype)
    values, ids = top_k_of(logits, top_k)
    torch.testing.assert_close(values, logits.topk(top_k).values, rtol=0, atol=0)
    torch.testing.assert_close(logits.gather(1, ids), values, rtol=0, atol=0)


@dtypes
@pytest.mark.parametrize(("num_rows", "top_k", "vocab_size"), SHAPES)
def test_targets_equal_the_whole_softmax(dtype, num_rows, top_k, vocab_size):
    logits = make_logits(num_rows, vocab_size, dtype)
    check(keep(logits, top_k), logits, top_k)


@dtypes
def test_ties(dtype):
    # Whole rows of equal logits, and ties across the border of the kept ones.
    equal = torch.zeros(2, 24 * 50 + 5)
    steps = torch.arange(24 * 50 + 5).div(3, rounding_mode="floor").remainder(100).expand(2, -1).float()
    logits = torch.cat([equal, steps / 8]).to(dtype)
    check(keep(logits, 8), logits, 8)


@pytest.mark.parametrize("best", [0, 1, 49, 50, 1199, 1200, 1204])
def test_the_best_id_may_be_anywhere(best):
    logits = make_logits(3, 1205, torch.float32)
    logits[:, best] = 100
    targets = keep(logits, 4)
    assert (targets.ids_PK[:, 0] == best).all()
    assert (targets.log_tail_P < -50).all()


def test_neighbours_of_one_block_are_all_kept():
    logits = make_logits(2, 24 * 60, torch.float32, scale=0.1)
    chosen = [3 + 60 * n for n in range(10)]  # with 60 blocks, all of one block
    logits[:, chosen] = torch.linspace(20, 10, 10)
    assert keep(logits, 10).ids_PK.tolist() == [chosen, chosen]


@dtypes
def test_all_kept_leaves_no_tail(dtype):
    logits = make_logits(6, 40, dtype)
    targets = keep(logits, 40)
    assert (targets.log_tail_P == -np.inf).all()
    check(targets, logits, 40)


@dtypes
@pytest.mark.parametrize("vocab_size", [50, 24 * 40 + 3])
def test_ids_that_the_teacher_rules_out(dtype, vocab_size):
    logits = make_logits(5, vocab_size, dtype)
    logits[:, 5::2] = -torch.inf
    targets = keep(logits, 4, torch.zeros(5, dtype=torch.int64))
    check(targets, logits, 4, torch.zeros(5, dtype=torch.int64))


def test_fewer_possible_ids_than_are_kept():
    logits = torch.full((2, 50), -torch.inf)
    logits[:, 7] = 1.0
    targets = keep(logits, 4, torch.tensor([7, 3]))
    assert (targets.ids_PK[:, 0] == 7).all()
    np.testing.assert_allclose(np.exp(targets.logprobs_PK), [[1, 0, 0, 0]] * 2)
    assert np.isfinite(targets.logprobs_PK).all()
    np.testing.assert_allclose(targets.entropy_P, 0, atol=1e-6)
    # A gold token that cannot be is very improbable, and still a number that later sums survive.
    assert targets.gold_logprob_P[0] == pytest.approx(0)
    assert -1e5 < targets.gold_logprob_P[1] < -1e3


@pytest.mark.parametrize("shift", [-3e4, 3e4, 1e6])
def test_a_shift_of_all_logits_changes_nothing(shift):
    logits = make_logits(5, 1000, torch.float32).round()
    np.testing.assert_array_equal(keep(logits + shift, 8).logprobs_PK, keep(logits, 8).logprobs_PK)


@pytest.mark.parametrize("num_positions", [1, 31, 32, 33, 256, 257, 300])
def test_chunks_of_positions_do_not_matter(num_positions):
    logits = make_logits(300, 200, torch.float32)[:num_positions]
    whole = keep(logits, 5)
    assert whole.num_positions == num_positions
    for row in {0, num_positions // 2, num_positions - 1}:
        alone = keep(logits[row : row + 1], 5, labels_for(logits)[row : row + 1])
        for name, values in vars(alone).items():
            np.testing.assert_allclose(values[0], getattr(whole, name)[row], rtol=1e-6, atol=1e-6)


def test_the_teachers_logits_are_left_alone():
    logits = make_logits(10, 1000, torch.float32)
    before = logits.clone()
    keep(logits, 5)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 5, 299])
@pytest.mark.parametrize("vocab_size", [50, 24 * 40 + 3])
def test_nonsense_is_refused_with_its_row(dtype, bad, row, vocab_size):
    logits = make_logits(300, vocab_size, dtype)
    logits[row, vocab_size - 1] = bad
    with pytest.raises(NonFiniteLogitsError, match=rf"NaN or infinite at 1 positions of a batch, first at {row}") as it:
        keep(logits, 4)
    assert it.value.row == row
    assert isinstance(it.value, TeacherError)


def test_a_row_that_rules_everything_out_is_refused():
    logits = make_logits(4, 100, torch.float32)
    logits[2] = -torch.inf
    with pytest.raises(NonFiniteLogitsError) as it:
        keep(logits, 4)
    assert it.value.row == 2


def test_nan_everywhere():
    with pytest.raises(NonFiniteLogitsError, match="at 6 positions of a batch, first at 0"):
        keep(torch.full((6, 100), torch.nan), 4)
