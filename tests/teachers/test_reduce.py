from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.errors import TeacherError
from kdcache.schema import TargetsRecord
from kdcache.teachers import TargetReducer, reduce_top_k, sample_uniforms
from kdcache.teachers.reduce import ChunkSizes, NonFiniteLogitsError, top_k_of
from tests.loops import loop
from tests.teachers.test_samples import chi_square

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = loop("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
#: Sizes on both sides of every block border: small, divisible by 24 and not, prime.
SHAPES = [(7, 1, 1), (5, 3, 3), (9, 4, 50), (4, 1, 24 * 40), (4, 8, 24 * 40 + 1), (33, 8, 997), (3, 64, 24 * 256 + 23)]


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows * vocab_size)
    return (scale * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def labels_for(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(logits)) * 7 % logits.shape[1]


def keep(logits, top_k, labels=None):
    labels = labels_for(logits) if labels is None else labels
    return reduce_top_k(lambda start, stop: logits[start:stop], labels, top_k)


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
@loop(("num_rows", "top_k", "vocab_size"), SHAPES)
def test_top_k_of_equals_topk_in_values(dtype, num_rows, top_k, vocab_size):
    logits = make_logits(num_rows, vocab_size, dtype)
    values, ids = top_k_of(logits, top_k)
    torch.testing.assert_close(values, logits.topk(top_k).values, rtol=0, atol=0)
    torch.testing.assert_close(logits.gather(1, ids), values, rtol=0, atol=0)


@dtypes
@loop(("num_rows", "top_k", "vocab_size"), SHAPES)
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


@loop("best", [0, 1, 49, 50, 1199, 1200, 1204])
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
@loop("vocab_size", [50, 24 * 40 + 3])
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


@loop("shift", [-3e4, 3e4, 1e6])
def test_a_shift_of_all_logits_changes_nothing(shift):
    logits = make_logits(5, 1000, torch.float32).round()
    np.testing.assert_array_equal(keep(logits + shift, 8).logprobs_PK, keep(logits, 8).logprobs_PK)


@loop("num_positions", [1, 31, 32, 33, 256, 257, 300])
def test_chunks_of_positions_do_not_matter(num_positions):
    logits = make_logits(300, 200, torch.float32)[:num_positions]
    whole = keep(logits, 5)
    assert whole.num_positions == num_positions
    for row in {0, num_positions // 2, num_positions - 1}:
        alone = keep(logits[row : row + 1], 5, labels_for(logits)[row : row + 1])
        for name in ("ids_PK", "logprobs_PK", "log_tail_P", "gold_logprob_P", "entropy_P"):
            np.testing.assert_allclose(getattr(alone, name)[0], getattr(whole, name)[row], rtol=1e-6, atol=1e-6)


def test_the_teachers_logits_are_left_alone():
    logits = make_logits(10, 1000, torch.float32)
    before = logits.clone()
    keep(logits, 5)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


@dtypes
@loop("bad", [float("nan"), float("inf")])
@loop("row", [0, 5, 299])
@loop("vocab_size", [50, 24 * 40 + 3])
def test_nonsense_is_refused_with_its_row(dtype, bad, row, vocab_size):
    logits = make_logits(300, vocab_size, dtype)
    logits[row, vocab_size - 1] = bad
    with pytest.raises(NonFiniteLogitsError, match=rf"NaN or infinite at 1 position of a batch, first at {row}") as it:
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


# ------------------------------------------------------------------------------------ other targets than the top k

VOCAB = 24 * 40 + 3
#: By name: top-k, all ids kept, none kept; thresholds of both kinds; and everything together.
RECORDS = {
    "top-k": TargetsRecord(top_k=8),
    "whole": TargetsRecord(top_k=VOCAB),
    "sampled": TargetsRecord(kind="sampled", top_k=0, num_samples=30),
    "hybrid": TargetsRecord(kind="hybrid", top_k=8, num_samples=30),
    "probability": TargetsRecord(top_k=40, min_prob=0.01),
    "mass": TargetsRecord(top_k=40, min_mass=0.8),
    "both": TargetsRecord(top_k=40, min_prob=0.003, min_mass=0.9),
    "ragged whole": TargetsRecord(top_k=VOCAB, min_prob=1e-5),
    "ragged hybrid": TargetsRecord(kind="hybrid", top_k=40, min_mass=0.7, num_samples=30, tail_prior=True),
}
records = loop("record", RECORDS.values(), ids=RECORDS)


def peaked_and_flat(num_rows=24, vocab_size=VOCAB, dtype=torch.float32):
    """Rows from almost uniform to almost certain; a few ids are ruled out."""
    logits = make_logits(num_rows, vocab_size, torch.float32, scale=1.0) * torch.linspace(0.1, 8, num_rows)[:, None]
    logits[3::4, 2::5] = -torch.inf
    return logits.to(dtype)


def keep_as(record, logits, labels=None, chunks=None, keeper=None, seed=0):
    labels = logits.argmin(1) * 0 + 1 if labels is None else labels
    numbers = sample_uniforms(seed, [0], [len(logits)], record.num_samples) if record.num_samples else None
    keeper = keeper or TargetReducer(record, chunks)
    return keeper(lambda start, stop: logits[start:stop], labels, numbers)


def num_kept_of(record, logits):
    """The rule in words, on sorted float64 probabilities."""
    probs = logits.double().softmax(-1).sort(descending=True).values[:, : record.top_k]
    counts = []
    for row in probs.tolist():
        enough = next((n for n in range(1, len(row)) if sum(row[:n]) >= record.min_mass), len(row))
        probable = sum(p >= record.min_prob for p in row)
        counts.append(max(1, min(enough, probable)) if record.min_mass < 1 else max(1, probable))
    return counts


def kept_mask(targets, vocab_size=VOCAB):
    """Return which ids of the vocabulary are kept [P, V]."""
    kept = torch.zeros(targets.num_positions, vocab_size, dtype=torch.bool)
    real = targets.logprobs_PK > -np.inf
    for row, ids in enumerate(targets.ids_PK):
        kept[row, ids[real[row]].astype(np.int64)] = True
    return kept


@records
@dtypes
def test_scalars_are_exact_whatever_is_kept(record, dtype):
    logits = peaked_and_flat(dtype=dtype)
    targets = keep_as(record, logits)
    logprobs = logits.double().log_softmax(-1)
    outside = logprobs.masked_fill(kept_mask(targets), -torch.inf).logsumexp(-1)
    # A ruled-out id that is kept has a tiny probability in place of 0, which is why -inf here means "below e^-1000".
    np.testing.assert_allclose(targets.log_tail_P, outside, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(targets.gold_logprob_P, logprobs[:, 1], rtol=2e-6, atol=2e-6)
    terms = torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0)
    np.testing.assert_allclose(targets.entropy_P, -terms.sum(-1), rtol=1e-5, atol=1e-5)


@loop("dtype", DTYPES)
def test_with_no_ids_the_tail_is_everything(dtype):
    targets = keep_as(RECORDS["sampled"], peaked_and_flat(dtype=dtype))
    assert targets.ids_PK.shape == targets.logprobs_PK.shape == (24, 0)
    assert (targets.log_tail_P == 0).all()
    assert targets.num_kept_P is None


@loop("name", ["probability", "mass", "both", "ragged whole"])
def test_thresholds_keep_a_prefix(name):
    record, logits = RECORDS[name], peaked_and_flat()
    targets, full = keep_as(record, logits), keep(logits, record.top_k, torch.ones(24, dtype=torch.int64))
    assert targets.num_kept_P.dtype == np.int32
    assert targets.num_kept_P.tolist() == num_kept_of(record, logits)
    assert len(set(targets.num_kept_P.tolist())) > 3
    columns = np.arange(record.top_k) < targets.num_kept_P[:, None]
    np.testing.assert_array_equal(targets.ids_PK[columns], full.ids_PK[columns])
    np.testing.assert_array_equal(targets.logprobs_PK[columns], full.logprobs_PK[columns])
    assert (targets.logprobs_PK[~columns] == -np.inf).all()
    np.testing.assert_array_equal(targets.ids_PK, np.where(columns, full.ids_PK, full.ids_PK[:, :1]))


def test_the_most_probable_id_is_always_kept():
    targets = keep_as(TargetsRecord(top_k=4, min_prob=0.5), torch.zeros(3, 100))
    assert (targets.num_kept_P == 1).all()
    np.testing.assert_allclose(np.exp(targets.log_tail_P), 0.99, rtol=1e-6)


def test_dropped_ids_are_added_to_the_tail_not_subtracted_from_the_head():
    # The tail is 5e-9 of the mass: 1 - head would be 0 or noise in float32.
    logits = torch.full((1, 60), -25.0)
    logits[0, :3] = torch.tensor([0.0, -19.2, -19.5])
    targets = keep_as(TargetsRecord(top_k=3, min_prob=0.1), logits)
    assert targets.num_kept_P.tolist() == [1]
    np.testing.assert_allclose(targets.log_tail_P, logits[:, 1:].double().logsumexp(-1), rtol=1e-6)


@records
@dtypes
def test_tails_at_other_temperatures(record, dtype):
    temperatures = (0.5, 2.0, 4.0, 500.0)
    logits = peaked_and_flat(dtype=dtype)
    targets = keep_as(record.model_copy(update={"temperatures": temperatures}), logits)
    assert targets.log_tails_PG.dtype == np.float32
    outside = ~kept_mask(targets)
    for column, temperature in zip(targets.log_tails_PG.T, temperatures, strict=True):
        logprobs = (logits.double() / temperature).log_softmax(-1)
        expected = logprobs.masked_fill(~outside, -torch.inf).logsumexp(-1).numpy()
        np.testing.assert_array_equal(column == -np.inf, expected < -100)
        possible = column > -np.inf
        np.testing.assert_allclose(column[possible], expected[possible], rtol=1e-5, atol=1e-5)
    # The rest is what it is without temperatures.
    plain = keep_as(record, logits)
    np.testing.assert_array_equal(plain.log_tail_P, targets.log_tail_P)
    np.testing.assert_array_equal(plain.logprobs_PK, targets.logprobs_PK)


@loop("name", ["sampled", "hybrid", "ragged hybrid"])
def test_draws_come_from_outside_the_kept_ids(name):
    record, logits = RECORDS[name], peaked_and_flat(24)[[2, 3, 9, 15]].repeat_interleave(600, 0)
    targets = keep_as(record, logits)
    assert (targets.samples.counts_PJ.sum(1) == record.num_samples).all()
    outside = ~kept_mask(targets)
    for first in range(0, len(logits), 600):
        rows = slice(first, first + 600)
        counts = np.bincount(
            targets.samples.ids_PJ[rows].ravel(), weights=targets.samples.counts_PJ[rows].ravel(), minlength=VOCAB
        )
        probs = (logits[first].double().softmax(-1) * outside[first]).numpy()
        assert (counts[probs == 0] == 0).all()
        assert abs(chi_square(counts, probs / probs.sum())) < 4


@loop("dtype", [np.float32, np.float64])
@loop("name", ["sampled", "hybrid", "ragged hybrid"])
def test_impossible_and_kept_ids_are_never_drawn(name, dtype):
    record, logits = RECORDS[name], peaked_and_flat(400)
    extremes = [0, 2.0**-53, 2.0**-24, 0.5, 1 - 2.0**-24, np.nextafter(dtype(1), dtype(0))]
    numbers = np.resize(np.array(extremes, dtype=dtype), (400, record.num_samples))
    targets = TargetReducer(record)(lambda a, b: logits[a:b], torch.ones(400, dtype=torch.int64), numbers)
    possible = (logits.double().softmax(-1) > 0) & ~kept_mask(targets)
    drawn = torch.from_numpy(targets.samples.ids_PJ.astype(np.int64))
    assert possible.gather(1, drawn)[torch.from_numpy(targets.samples.counts_PJ > 0)].all()


@loop("name", ["sampled", "hybrid", "ragged hybrid"])
def test_shared_out_draws_are_the_distribution_on_average(name):
    record, logits = RECORDS[name], peaked_and_flat()[[12]].expand(4000, -1)
    ids, logprobs, log_tail = keep_as(record, logits).merged()
    assert (log_tail == -np.inf).all()
    mean = np.bincount(ids.ravel(), weights=np.exp(logprobs.ravel().astype(np.float64)), minlength=VOCAB) / 4000
    probs = logits[0].double().softmax(-1).numpy()
    error = np.sqrt(probs / (4000 * record.num_samples))
    assert (np.abs(mean - probs) < 6 * error + 1e-4).all()


@loop("name", ["sampled", "hybrid", "ragged hybrid"])
@loop("chunks", [ChunkSizes(7, 3), ChunkSizes(100, 100), None])
def test_draws_do_not_depend_on_the_batch(name, chunks):
    record, logits = RECORDS[name], peaked_and_flat(60)
    lengths = [25, 1, 34]
    rows = torch.arange(60).split(lengths)
    numbers = sample_uniforms(5, [0, 1, 2], lengths, record.num_samples)
    whole = TargetReducer(record)(lambda start, stop: logits[start:stop], torch.ones(60, dtype=torch.int64), numbers)
    order = [2, 0]
    other = logits[torch.cat([rows[n] for n in order])]
    numbers = sample_uniforms(5, order, [lengths[n] for n in order], record.num_samples)
    again = TargetReducer(record, chunks)(lambda a, b: other[a:b], torch.ones(59, dtype=torch.int64), numbers)
    expected = whole.take(np.concatenate([rows[n].numpy() for n in order]))
    width = min(again.samples.ids_PJ.shape[1], expected.samples.ids_PJ.shape[1])
    np.testing.assert_array_equal(again.samples.ids_PJ[:, :width], expected.samples.ids_PJ[:, :width])
    np.testing.assert_array_equal(again.samples.counts_PJ[:, :width], expected.samples.counts_PJ[:, :width])
    assert (again.samples.counts_PJ.sum(1) == record.num_samples).all()


def test_other_seeds_draw_other_ids():
    first, second = (keep_as(RECORDS["sampled"], peaked_and_flat(), seed=seed).samples for seed in (0, 1))
    assert first.ids_PJ.shape != second.ids_PJ.shape or (first.ids_PJ != second.ids_PJ).any()


def test_a_row_with_nothing_outside_has_no_draws():
    logits = make_logits(6, 50, torch.float32)
    logits[2, 4:] = -torch.inf
    targets = keep_as(TargetsRecord(kind="hybrid", top_k=4, num_samples=9), logits)
    assert targets.samples.counts_PJ.sum(1).tolist() == [9, 9, 0, 9, 9, 9]
    assert targets.log_tail_P[2] == -np.inf
    whole = keep_as(TargetsRecord(kind="hybrid", top_k=50, num_samples=9), logits)
    assert whole.samples.ids_PJ.shape == (6, 0)


@loop("shape", [None, (23, 30), (24, 29)])
def test_draws_without_their_uniform_numbers_are_refused(shape):
    logits, labels = peaked_and_flat(), torch.ones(24, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"uniform numbers of shape \(24, 30\)"):
        TargetReducer(RECORDS["sampled"])(lambda a, b: logits[a:b], labels, None if shape is None else np.zeros(shape))


@loop("changes", [{}, {"min_prob": 0.01}, {"min_mass": 0.8}], ids=["plain", "probability", "mass"])
@loop("top_k", [4, VOCAB])
@dtypes
def test_tail_prior_is_the_mean_probability_while_not_kept(dtype, top_k, changes):
    keeper = TargetReducer(TargetsRecord(top_k=top_k, tail_prior=True, **changes))
    assert keeper.take_tail_sum() is None
    expected = np.zeros(VOCAB)
    for num_rows in (24, 300, 1):
        logits = peaked_and_flat(num_rows, dtype=dtype)
        targets = keep_as(keeper.record, logits, keeper=keeper)
        expected += logits.double().softmax(-1).masked_fill(kept_mask(targets), 0).sum(0).numpy()
    total, num_positions = keeper.take_tail_sum()
    assert total.dtype == np.float64
    assert num_positions == 325
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-12)
    assert keeper.take_tail_sum() is None
    keep_as(keeper.record, logits[:1], keeper=keeper)
    assert keeper.take_tail_sum()[1] == 1


def test_a_refused_batch_does_not_enter_the_tail_prior():
    keeper = TargetReducer(TargetsRecord(top_k=4, tail_prior=True))
    logits = peaked_and_flat()
    keep_as(keeper.record, logits, keeper=keeper)
    bad = logits.clone()
    bad[5, 7] = torch.nan
    with pytest.raises(NonFiniteLogitsError):
        keep_as(keeper.record, bad, keeper=keeper)
    total, num_positions = keeper.take_tail_sum()
    assert num_positions == 24
    assert np.isfinite(total).all()


def test_without_a_tail_prior_nothing_is_summed():
    keeper = TargetReducer(RECORDS["top-k"])
    keep_as(keeper.record, peaked_and_flat(), keeper=keeper)
    assert keeper.take_tail_sum() is None


@records
@loop("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonsense_is_refused_whatever_is_kept(record, bad):
    logits = make_logits(40, VOCAB, torch.float32)
    logits[33, slice(None) if bad == -float("inf") else slice(500, 501)] = bad
    changed = record.model_copy(update={"temperatures": (2.0,), "tail_prior": True})
    with pytest.raises(NonFiniteLogitsError, match="at 1 position of a batch, first at 33"):
        keep_as(changed, logits)
