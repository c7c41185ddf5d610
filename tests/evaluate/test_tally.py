from __future__ import annotations

import numpy as np
import pytest

from kdcache.evaluate.distributions import Calibration, Tally


def test_calibration_error_by_hand():
    calibration = Calibration()
    # Bin (14/15, 1]: 4 predictions, confidence .95, half of them right. Bin (7/15, 8/15]: 1 prediction at .5, right.
    calibration.add(np.array([0.95, 0.95, 0.95, 0.95, 0.5]), np.array([True, True, False, False, True]))
    assert calibration.error == pytest.approx((4 * abs(0.5 - 0.95) + 1 * abs(1 - 0.5)) / 5)


def test_calibration_of_perfect_and_of_no_predictions():
    calibration = Calibration()
    assert calibration.error == 0
    calibration.add(np.array([1.0, 1.0]), np.array([True, True]))
    assert calibration.error == 0
    calibration.add(np.array([0.0]), np.array([False]))
    assert calibration.error == 0


def test_sums_do_not_depend_on_batches():
    generator = np.random.default_rng(0)
    prob, correct, loss = generator.random(50), generator.random(50) < 0.5, generator.random(50)
    valid, labelled, kl = generator.random(50) < 0.7, generator.random(50) < 0.6, generator.random(50)
    loss[~labelled] = np.nan  # of the teacher, where the corpus has no answer
    whole, pieces = Tally(), Tally()
    for tally, parts in ((whole, [np.arange(50)]), (pieces, np.array_split(np.arange(50), 7))):
        for rows in parts:
            values = {"top1_prob_P": prob[rows], "correct_P": correct[rows], "loss_P": loss[rows], "kl": kl[rows]}
            tally.add(valid[rows], labelled[rows], **values)
    known = valid & labelled
    assert whole.num_positions == pieces.num_positions == valid.sum()
    assert whole.num_labelled == pieces.num_labelled == known.sum()
    assert pieces.mean("kl") == pytest.approx(kl[valid].mean())
    assert pieces.sums["loss"] / pieces.num_labelled == pytest.approx(loss[known].mean())
    assert pieces.sums["correct"] / pieces.num_labelled == pytest.approx(correct[known].mean())
    assert pieces.calibration.error == pytest.approx(whole.calibration.error)
