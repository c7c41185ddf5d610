from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from kdcache.teachers import sample_uniforms
from kdcache.teachers.samples import count_samples, sample_ids
from tests.loops import loop

#: On both sides of the borders of blocks of 64.
VOCABULARIES = [1, 2, 63, 64, 65, 128, 997, 64 * 20 + 1]
#: What rounding could push over an edge; float32's largest below 1 is 1 - 2^-24, float64's 1 - 2^-53.
ADVERSARIAL = [0.0, 2.0**-53, 2.0**-24, 0.25, 0.5, 1 - 2.0**-24, 1 - 2.0**-30, 1 - 2.0**-53]


def make_weights(num_rows: int, vocab_size: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (scale * torch.randn(num_rows, vocab_size, generator=generator)).exp()


def uniforms(num_rows: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(sample_uniforms(seed, [7], [num_rows], num_samples))


def chi_square(counts, probs):
    """Return how many standard deviations Pearson's statistic lies above its mean; rare ids count as one."""
    expected = counts.sum() * probs
    rare = expected < 5
    assert (counts[probs == 0] == 0).all()
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    degrees = max(1, used.sum() - 1)
    return (((counts - expected)[used] ** 2 / expected[used]).sum() - degrees) / np.sqrt(2 * degrees)


@loop("scale", [0.0, 1.0, 6.0], ids=["flat", "even", "peaked"])
@loop("vocab_size", VOCABULARIES)
def test_draws_invert_the_cumulative_sum(vocab_size, scale):
    weights = make_weights(20, vocab_size, scale)
    weights[1::2, 1::3] = 0
    sought = uniforms(20, 200)
    found = sample_ids(weights, sought)
    ends = weights.double().cumsum(1)
    expected = torch.searchsorted(ends, sought * ends[:, -1:], right=True)
    # A number that falls on the border between two ids may go either way.
    distance = (ends.gather(1, torch.minimum(found, expected)) / ends[:, -1:] - sought).abs()
    assert ((found == expected) | (distance < 1e-6)).all()
    assert (found == expected).double().mean() > 0.99


@loop("scale", [0.5, 3.0], ids=["even", "peaked"])
def test_draws_follow_the_distribution_in_every_block(scale):
    vocab_size = 64 * 9 + 17
    row = make_weights(1, vocab_size, scale)
    row[0, 5::7] = 0
    ids = sample_ids(row.expand(500, -1), uniforms(500, 400))
    counts = np.bincount(ids.flatten().numpy(), minlength=vocab_size)
    assert abs(chi_square(counts, (row[0].double() / row.double().sum()).numpy())) < 4
    blocks = np.add.reduceat(counts, range(0, vocab_size, 64))
    assert (blocks > 0).all()


def test_the_check_of_distributions_can_fail():
    probs = np.full(600, 1 / 600)
    counts = np.bincount(np.random.default_rng(0).integers(0, 600, 200_000), minlength=600)
    assert abs(chi_square(counts, probs)) < 4
    assert chi_square(counts, np.where(np.arange(600) % 2, 0.95, 1.05) / 600) > 4


@loop("vocab_size", VOCABULARIES)
@loop("size", [1.0, 1e-30, 1e-43])
def test_an_impossible_id_is_never_drawn(vocab_size, size):
    """Every id in turn is the only possible one; then all but one are; whatever the numbers are."""
    only = torch.eye(vocab_size) * size
    sought = torch.tensor([ADVERSARIAL], dtype=torch.float64).expand(vocab_size, -1)
    assert (sample_ids(only, sought) == torch.arange(vocab_size)[:, None]).all()
    if vocab_size > 1:
        others = (1 - torch.eye(vocab_size)) * size
        assert (sample_ids(others, sought) != torch.arange(vocab_size)[:, None]).all()


@loop("seed", range(3))
def test_impossible_ids_between_uneven_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = (20 * torch.randn(80, 1000, generator=generator)).clamp(max=40).exp()
    weights[torch.rand(80, 1000, generator=generator) < 0.7] = 0
    sought = torch.cat([torch.tensor([ADVERSARIAL], dtype=torch.float64).expand(80, -1), uniforms(80, 100)], 1)
    # Numbers right at the borders of the cumulative sum are the ones that rounding could mislead.
    ends = weights.double().cumsum(1)
    borders = (ends / ends[:, -1:]).clamp(max=1 - 2.0**-53)
    ids = sample_ids(weights, torch.cat([sought, borders, (borders - 2.0**-52).clamp(min=0)], 1))
    assert (weights.gather(1, ids) > 0).all()


def test_rows_without_weight_or_with_nan_still_answer_with_ids():
    weights = torch.ones(3, 100)
    weights[0], weights[1, 3] = 0, torch.nan
    ids = sample_ids(weights, uniforms(3, 50))
    assert ids.min() >= 0
    assert ids.max() < 100


def test_ids_of_a_large_vocabulary():
    weights = torch.zeros(2, 262_147)
    weights[0, 262_146] = weights[1, 131_072] = 1e-6
    assert sample_ids(weights, uniforms(2, 3)).tolist() == [[262_146] * 3, [131_072] * 3]


# ------------------------------------------------------------------------------------------------ uniform numbers


def test_uniform_numbers_depend_on_seed_and_sequence_alone():
    whole = sample_uniforms(3, [5, 9, 2], [4, 7, 1], 6)
    assert whole.shape == (12, 6)
    np.testing.assert_array_equal(whole[4:11], sample_uniforms(3, [9], [7], 6))
    np.testing.assert_array_equal(whole[11:], sample_uniforms(3, [2], [1], 6))
    assert not np.isclose(whole[:4], sample_uniforms(4, [5], [4], 6)).any()
    assert not np.isclose(whole[:4], sample_uniforms(5, [3], [4], 6)).any()


def test_uniform_numbers_are_uniform():
    numbers = sample_uniforms(0, range(50), [40] * 50, 50)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert abs(chi_square(counts, np.full(100, 0.01))) < 4
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.1


def test_uniform_numbers_never_change():
    # Caches of different machines and versions hold the same samples because of these.
    expected = [[0.4821286018761155, 0.7241355726248441], [0.3269267191215238, 0.5996375270330707]]
    np.testing.assert_array_equal(sample_uniforms(7, [3, 2**40], [1, 1], 2), expected)


def test_no_sequences_and_no_draws():
    assert sample_uniforms(0, [], [], 5).shape == (0, 5)
    assert sample_uniforms(0, [1, 2], [3, 4], 0).shape == (7, 0)


# ---------------------------------------------------------------------------------------------------- counting


def expected_rows(ids, is_empty):
    rows = [[] if empty else Counter(row).items() for row, empty in zip(ids.tolist(), is_empty, strict=True)]
    return [sorted(row, key=lambda item: (-item[1], item[0])) for row in rows]


@loop(("num_rows", "num_samples", "vocab_size"), [(1, 1, 5), (40, 50, 8), (40, 50, 300_000), (7, 3, 2)])
def test_counts_of_distinct_ids(num_rows, num_samples, vocab_size):
    rng = np.random.default_rng(num_samples)
    ids = rng.integers(0, vocab_size, (num_rows, num_samples))
    ids[num_rows // 2 :] //= 1 + vocab_size // 4
    is_empty = rng.random(num_rows) < 0.2
    samples = count_samples(ids, is_empty)
    expected = expected_rows(ids, is_empty)
    assert samples.ids_PJ.shape == samples.counts_PJ.shape == (num_rows, max(map(len, expected)))
    assert (samples.counts_PJ.sum(1) == np.where(is_empty, 0, num_samples)).all()
    for row, wanted in enumerate(expected):
        found = list(zip(samples.ids_PJ[row].tolist(), samples.counts_PJ[row].tolist(), strict=True))
        assert found[: len(wanted)] == wanted
        assert all(count == 0 for _, count in found[len(wanted) :])


def test_all_draws_different_are_all_kept():
    samples = count_samples(np.arange(60)[None, ::-1].copy(), np.zeros(1, bool))
    assert samples.ids_PJ.tolist() == [list(range(60))]
    assert (samples.counts_PJ == 1).all()


def test_nothing_to_draw_from_anywhere():
    samples = count_samples(np.zeros((4, 9), np.int64), np.ones(4, bool))
    assert samples.ids_PJ.shape == samples.counts_PJ.shape == (4, 0)
