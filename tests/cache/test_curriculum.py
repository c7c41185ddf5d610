from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import open_cache
from kdcache.cache.curriculum import PACINGS, Curriculum, PacedOrder
from kdcache.cache.order import ShuffledOrder, epoch_order
from kdcache.config import build
from kdcache.errors import ConfigError
from tests.loops import loop


def curriculum(**settings) -> Curriculum:
    return build(Curriculum, settings)


def run_of(ranked, size, *, epochs=1.0, name="texts/0", **settings) -> list[np.ndarray]:
    """The sequences of every step of a run, as `MicroBatches` cuts them."""
    steps_per_epoch = -(-len(ranked) // size)
    num_steps = int(np.ceil(epochs * steps_per_epoch))
    order = PacedOrder(
        curriculum(**settings), np.asarray(ranked), num_steps=num_steps, sequences_per_step=size, name=name
    )
    epochs_E = [order.epoch(number) for number in range(-(-num_steps // steps_per_epoch))]
    assert all(epoch.shape == (len(ranked),) and epoch.dtype == np.int64 for epoch in epochs_E)
    steps = [epoch[start : start + size] for epoch in epochs_E for start in range(0, len(ranked), size)]
    return steps[:num_steps]


sizes = st.tuples(st.integers(1, 60), st.integers(1, 9))
paced = st.sampled_from(["linear", "root", "step"])
shares = st.floats(0.01, 1.0)


@given(sizes, st.sampled_from(list(PACINGS)), shares, shares, st.floats(0.3, 4.0))
def test_no_step_has_a_sequence_twice_and_a_pass_repeats_none(size, pacing, start, full_at, epochs):
    num_sequences, sequences_per_step = size
    settings = {} if pacing == "sorted" else {"start": start, "full_at": full_at}
    steps = run_of(range(num_sequences), sequences_per_step, epochs=epochs, pacing=pacing, **settings)
    counts = np.zeros(num_sequences, dtype=int)
    for step in steps:
        assert len(set(step.tolist())) == len(step)
        counts[step] += 1
        # An easier one is available at least as long, so it has come in every pass that is over.
        assert all(counts[:sequence].min(initial=len(steps)) >= counts[sequence] - 1 for sequence in step)
    again = run_of(range(num_sequences), sequences_per_step, epochs=epochs, pacing=pacing, **settings)
    assert all(np.array_equal(a, b) for a, b in zip(steps, again, strict=True)), "always the same"


@given(sizes, st.sampled_from(["linear", "root"]), shares, st.floats(0.01, 0.5))
def test_one_epoch_draws_every_sequence_once(size, pacing, start, full_at):
    steps = run_of(range(size[0]), size[1], pacing=pacing, start=start, full_at=full_at)
    assert sorted(np.concatenate(steps).tolist()) == list(range(size[0]))


@given(sizes, paced, shares, st.integers(2, 5))
def test_every_sequence_comes_when_all_are_available_an_epoch_before_the_end(size, pacing, start, epochs):
    steps = run_of(range(size[0]), size[1], epochs=epochs, pacing=pacing, start=start, full_at=1 - 1 / epochs)
    assert set(np.concatenate(steps).tolist()) == set(range(size[0]))


@given(sizes, paced, shares, shares)
def test_a_step_reaches_no_further_than_the_pacing_allows(size, pacing, start, full_at):
    num_sequences, sequences_per_step = size
    steps = run_of(range(num_sequences), sequences_per_step, epochs=2, pacing=pacing, start=start, full_at=full_at)
    config = curriculum(pacing=pacing, start=start, full_at=full_at)
    for number, step in enumerate(steps):
        share = config.share(number / max(len(steps) - 1, 1), 0.0)
        assert step.max() < max(np.ceil(share * num_sequences + 1e-6), sequences_per_step)


def test_new_sequences_come_soon_and_mixed_with_those_that_wait():
    steps = run_of(range(1000), 10, pacing="linear", start=0.1, full_at=0.5)
    first_half = np.concatenate(steps[:50])
    # At every moment the step is a sample of all that waits: some easy, some new.
    assert np.concatenate(steps[:5]).max() < 200
    assert (np.concatenate(steps[40:50]) < 400).any()
    assert (np.concatenate(steps[40:50]) > 800).any()
    assert first_half.mean() < 350 < 650 < np.concatenate(steps[50:]).mean()


def test_a_small_pool_is_used_up_before_a_sequence_repeats():
    steps = run_of(range(100), 4, epochs=4, pacing="step", start=0.1, full_at=0.5)
    drawn = np.concatenate(steps[:50])
    for begin in range(0, 200, 10):
        assert sorted(drawn[begin : begin + 10].tolist()) == list(range(10))
    # The new ones arrive in an empty pool, and those that everyone knows wait for the next pass.
    rest = np.concatenate(steps[50:])
    assert sorted(rest[:90].tolist()) == list(range(10, 100))
    assert sorted(rest[90:190].tolist()) == list(range(100))


@loop("epochs", [1, 2])
def test_sorted_is_the_strict_order_once_and_shuffled_after_it(epochs):
    steps = run_of(range(22), 4, epochs=epochs, pacing="sorted")
    assert [sorted(step.tolist()) for step in steps[:6]] == [list(range(n, min(n + 4, 22))) for n in range(0, 22, 4)]
    if epochs == 2:
        again = np.concatenate(steps[6:])
        assert sorted(again.tolist()) == list(range(22))
        assert [sorted(step.tolist()) for step in steps[6:]] != [sorted(step.tolist()) for step in steps[:6]]


def test_seeds_texts_and_settings_each_change_the_order():
    variants = [{}, {"name": "texts/1"}, {"start": 0.5}, {"pacing": "linear"}, {"full_at": 1.0}, {"epochs": 2}]
    orders = [np.concatenate(run_of(range(60), 5, **variant)).tobytes() for variant in variants]
    assert len(set(orders)) == len(variants)


def test_the_order_never_changes_between_versions():
    # A run that a later version resumes must go on in the same order.
    steps = run_of([4, 2, 6, 0, 1, 5, 3], 2, name="x", pacing="root", start=0.3, full_at=0.5)
    assert [step.tolist() for step in steps] == [[6, 4], [2, 0], [3, 1], [5]]


def test_an_epoch_can_be_asked_for_alone():
    def order():
        return PacedOrder(curriculum(), np.arange(23), num_steps=18, sequences_per_step=4, name="x")

    first = order()
    epochs = [first.epoch(number) for number in range(3)]
    np.testing.assert_array_equal(order().epoch(2), epochs[2])
    np.testing.assert_array_equal(first.epoch(0), epochs[0])


# ------------------------------------------------------------------------------------------ what pacings say


@loop("pacing", [name for name in PACINGS if name != "sorted"])
def test_pacings_begin_at_start_never_fall_and_end_at_all(pacing):
    config = curriculum(pacing=pacing, start=0.1, full_at=0.6)
    found = [config.share(progress, 0.0) for progress in np.linspace(0, 1, 101)]
    assert found[0] == pytest.approx(0.1)
    assert found == sorted(found)
    assert found[59] < 1
    assert found[61:] == [1.0] * 40


def test_root_is_the_competence_of_platanios_et_al():
    config = curriculum(pacing="root", start=0.01, full_at=1.0)
    for progress in (0.0, 0.25, 0.7):
        assert config.share(progress, 0.0) == pytest.approx(np.sqrt(progress * (1 - 0.01**2) + 0.01**2))


# -------------------------------------------------------------------------------------------------- ranking

TABLE = pa.table(
    {
        "sequence": [0, 1, 2, 3, 4, 5],
        "teacher_loss": pa.array([3.0, 1.0, 2.0, 1.0, 5.0, 1.0], pa.float32()),
        "grade": pa.array([1, 2, None, 4, 5, 6], pa.int8()),
        "read ease": [1.0, float("nan"), 3.0, 4.0, 5.0, 6.0],
        "source": ["a", "b", "a", "b", "a", "b"],
        "good": [True] * 6,
    }
)
ALL = np.arange(6)


def test_ranking_is_by_the_column_either_way_round_with_equal_ones_mixed():
    up = curriculum(by="teacher_loss").ranking(TABLE, ALL, "x").tolist()
    assert (set(up[:3]), up[3:]) == ({1, 3, 5}, [2, 0, 4])
    down = curriculum(by="teacher_loss", order="hard-to-easy").ranking(TABLE, ALL, "x").tolist()
    assert (down[:3], set(down[3:])) == ([4, 0, 2], {1, 3, 5})
    orders = {tuple(curriculum().ranking(TABLE, ALL, str(seed)).tolist()) for seed in range(20)}
    assert len(orders) == 6, "every order of three equal ones"


def test_ranking_is_of_the_chosen_sequences_alone():
    ranked = curriculum(by="grade", order="hard-to-easy").ranking(TABLE, np.array([0, 3, 5]), "x")
    assert ranked.tolist() == [5, 3, 0], "and a value that the others lack is no mistake"


@loop(
    ("by", "message"),
    [
        ("teacher_los", "curriculum.by: unknown column 'teacher_los'; did you mean 'teacher_loss'?"),
        ("source", "curriculum.by: column 'source' holds a text, not numbers; columns of numbers are sequence, "),
        ("good", "column 'good' holds a condition, not numbers"),
        ("grade", "column 'grade' has no value for 1 of 6 sequences; exclude them .*'grade == grade'"),
        ("read ease", "has no value for 1 of 6 sequences; .*'`read ease` == `read ease`'"),
    ],
)
def test_columns_that_say_nothing_of_difficulty(by, message):
    with pytest.raises(ConfigError, match=message):
        curriculum(by=by).ranking(TABLE, ALL, "x")


def test_a_column_that_the_teacher_does_not_give_says_so():
    missing = r"curriculum\.by: the cache has no column 'teacher_entropy', since its teacher does not give the entropy"
    with pytest.raises(ConfigError, match=missing):
        curriculum(by="teacher_entropy").ranking(TABLE, ALL, "x")


@loop("column", ["grade", "`read ease`"])
def test_the_advice_for_missing_values_works(column):
    from kdcache.cache.filters import select_sequences

    chosen = select_sequences(TABLE, f"{column} == {column}")
    assert len(curriculum(by=column.strip("`")).ranking(TABLE, chosen, "x")) == 5


@loop(
    ("settings", "message"),
    [
        ({"pacing": "liner"}, "unknown pacing 'liner'; did you mean 'linear'"),
        ({"pacing": "sorted", "start": 0.1}, "pacing sorted has no start; use linear, root or step"),
        ({"pacing": "sorted", "start": 0.1, "full_at": 1}, "has no full_at and no start"),
        ({"start": 0}, "'start'.*greater than 0"),
        ({"full_at": 1.5}, "'full_at'.*less than or equal to 1"),
        ({"order": "easy"}, "'order'.*easy-to-hard"),
        ({"column": "teacher_loss"}, "unknown setting 'column'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        curriculum(**settings)


# ----------------------------------------------------------------------------------------- the plain order


def test_chosen_sequences_come_in_the_order_that_they_have_among_all():
    starts = np.array([0, 10, 20, 40])
    everything = ShuffledOrder(starts, 3, 2, "x", num_streams=1)
    chosen = ShuffledOrder(starts, 3, 2, "x", np.array([3, 7, 15, 30, 39]), num_streams=1)
    for epoch in range(3):
        np.testing.assert_array_equal(everything.epoch(epoch), epoch_order(starts, 3, epoch, 2, "x", num_streams=1))
        expected = [n for n in everything.epoch(epoch) if n in (3, 7, 15, 30, 39)]
        assert chosen.epoch(epoch).tolist() == expected
    assert (everything.num_sequences, chosen.num_sequences) == (40, 5)


@pytest.mark.parametrize("kind", ["all of top-k", "hybrid", "hidden"])
def test_bytes_in_memory_are_known_before_shards_are_read(kind, written):
    cache = open_cache(str(written(kind)), max_open_shards=99)
    cache.read(range(len(cache)))
    # Codecs of rows of several lengths add where each begins.
    assert cache.encoded_bytes() <= cache.open_bytes() <= 1.5 * cache.encoded_bytes()
