"""What decoding may change, and how to compare in spite of it."""

from __future__ import annotations

import numpy as np

from kdcache.codecs import TopKCodec
from kdcache.schema import Samples, Targets

#: What each codec of kept ids states: the largest error of a kept log-probability before re-normalisation, in nats,
#: absolute and relative to its size.
ERRORS = {"compact": (0.5 / 16, 0.0), "fp16": (0.0, 2**-11), "bf16": (0.0, 2**-8), "exact": (0.0, 0.0)}


def in_order_of(expected_PK: np.ndarray, ids_PK: np.ndarray, logprobs_PK: np.ndarray) -> np.ndarray:
    """Return decoded log-probabilities in the order of the ids that were encoded, after checking that ids are the same.

    Ids of equal decoded log-probability have no order, but the first of a row stays, and rows descend both ways.
    """
    found, wanted = (np.argsort(ids, axis=1, kind="stable") for ids in (ids_PK, expected_PK))
    np.testing.assert_array_equal(
        np.take_along_axis(ids_PK, found, axis=1), np.take_along_axis(expected_PK, wanted, axis=1)
    )
    np.testing.assert_array_equal(ids_PK[:, :1], expected_PK[:, :1])
    ordered = np.empty_like(logprobs_PK)
    np.put_along_axis(ordered, wanted, np.take_along_axis(logprobs_PK, found, axis=1), axis=1)
    for values in (logprobs_PK, ordered):
        assert (values[:, 1:] <= values[:, :-1]).all()
    return ordered


def check_head(codec: TopKCodec, decoded: Targets, targets: Targets) -> None:
    """The same ids, and log-probabilities within what the codec states."""
    found = in_order_of(targets.ids_PK, decoded.ids_PK, decoded.logprobs_PK)
    kept = ~np.isneginf(targets.logprobs_PK)
    np.testing.assert_array_equal(np.isneginf(found), ~kept)
    logprobs = np.where(kept, targets.logprobs_PK, 0)
    probs = np.where(kept, np.exp(targets.logprobs_PK.astype(np.float64)), 0)
    absolute, relative = ERRORS[codec.name]
    one = absolute + relative * np.abs(logprobs)
    # Scaling the head to 1 - tail shifts all of a row by at most the largest error of a kept value and of the tail.
    head = np.maximum(probs.sum(axis=1), 1e-30)
    shift = (probs * one).sum(axis=1) / head
    with np.errstate(invalid="ignore"):
        tail = scalar_error(codec) * np.nan_to_num(np.abs(targets.log_tail_P) * np.exp(targets.log_tail_P)) / head
    slack = 1.1 * (one + (shift + tail)[:, None]) + (1e-5 if codec.name != "exact" else 0)
    error = np.abs(np.where(kept, found, 0) - logprobs)
    assert (error <= slack)[representable(codec, logprobs) & kept].all(), error.max()


def representable(codec: TopKCodec, logprobs_PK: np.ndarray) -> np.ndarray:
    """Where no step so far is longer than the compact code's longest; what is cut only ever raises what follows it."""
    steps = -np.diff(logprobs_PK, axis=1, prepend=logprobs_PK[:, :1])
    return (np.cumsum(steps > 255 / 16, axis=1) == 0) | (codec.name != "compact")


def scalar_error(codec: TopKCodec) -> float:
    """Relative error of the numbers beside the kept ids."""
    return 0.0 if codec.scalar_dtype == "float32" else 2**-11


def check_samples(found: Samples | None, expected: Samples | None) -> None:
    """The same ids as often in every row, whatever their order."""
    assert (found is None) is (expected is None)
    if found is not None and expected is not None:
        assert as_counts(found) == as_counts(expected)


def as_counts(samples: Samples) -> list[dict[int, int]]:
    """Each row as id -> count; an id that stands twice would be lost, so that is refused."""
    rows = []
    for ids, counts in zip(samples.ids_PJ.tolist(), samples.counts_PJ.tolist(), strict=True):
        drawn = [(i, c) for i, c in zip(ids, counts, strict=True) if c > 0]
        rows.append(dict(drawn))
        assert len(rows[-1]) == len(drawn)
    return rows


def check_merged(targets: Targets) -> None:
    """Every merged row is a distribution over distinct ids; places that stand for nothing repeat the first id."""
    ids, logprobs, log_tail = targets.merged()
    assert ids.shape == logprobs.shape
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1) + np.exp(log_tail.astype(np.float64))
    np.testing.assert_allclose(mass, 1, atol=2e-5)
    nothing = np.isneginf(logprobs)
    np.testing.assert_array_equal(ids[nothing], np.broadcast_to(ids[:, :1], ids.shape)[nothing])
    for row, kept in zip(ids, ~nothing, strict=True):
        assert len(set(row[kept].tolist())) == kept.sum()
