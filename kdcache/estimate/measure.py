"""Measure presets on a sample, in two walks over the teacher's logits for all presets together.

The first walk reduces the logits to each kind of targets (`reduce`). Then codecs encode and decode them (`storage`).
The second walk computes what needs the whole vocabulary again, now that priors and decoded states are known: the
teacher's mean distribution, its cross-entropy with the priors, and the KL of logits from decoded states. Everything
else follows from the stored rows (`rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.estimate.reduce import Reduced, reduce_all
from kdcache.estimate.rows import Rows, Spread, batch_mean_error, batches_of, codec_kl, full_kl, within_tail_kl
from kdcache.estimate.sample import HeadLogits, Sample, split
from kdcache.estimate.storage import Stored, store
from kdcache.schema import Plan, TargetsRecord

#: Stands for the log of a probability that is 0 in float32.
_LOG_TINY = float(np.log(np.finfo(np.float32).tiny))
Report = Callable[[int], object]


@dataclass
class PresetMeasurement:
    """What a preset costs and how close its targets are to the teacher; means over the sample's positions, in nats.

    ``full_kl`` by treatment of the tail (``full`` where nothing is lost but rounding), ``batch_mean_error`` likewise
    (``samples`` for rows of samples); see `kdcache.estimate.rows`. None: not defined.
    """

    bytes_per_token: float
    bytes_interval: tuple[float, float] | None
    """The 90 % interval of ``bytes_per_token`` for the whole corpus; None for a single sequence."""
    bytes_by_field: dict[str, float]
    kept_mass: float | None
    codec_kl: float | None
    within_tail_kl: float | None
    full_kl: dict[str, float]
    batch_mean_error: dict[str, float]
    keep_tokens_per_s: float
    encode_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass
class Reference:
    """The results of the second walk, in float64.

    ``means_QV``: the teacher's mean distribution in each batch of `batches_of`; ``cross``: for every kind of targets
    with a tail prior the sum over the vocabulary of t log prior, [P], by the prior of the *other* half;
    ``state_kl`` and ``state_means``: KL and mean distributions of logits from decoded states, by preset.
    """

    means_QV: NDArray[np.float64]
    cross: dict[TargetsRecord, NDArray[np.float64]] = field(default_factory=dict)
    state_kl: dict[str, float] = field(default_factory=dict)
    state_means: dict[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass
class Measured:
    """Measurements by preset, and the intermediate results, for comparisons with other methods."""

    presets: dict[str, PresetMeasurement]
    kept: dict[TargetsRecord, Reduced]
    stored: dict[str, Stored]
    reference: Reference


def measure(
    sample: Sample, plans: Mapping[str, Plan], *, also: tuple[TargetsRecord, ...] = (), report: Report | None = None
) -> Measured:
    """Measure every plan of ``plans`` (by the name of its preset) on ``sample``.

    ``also`` are further kinds of targets to reduce to. ``report`` is called with the positions done, of
    twice as many as there are. Plans with hidden states need a sample whose logits are `HeadLogits`.
    """
    records = dict.fromkeys([*(plan.targets for plan in plans.values()), *also])
    kept = reduce_all(sample, records, report=report)
    states_PD = sample.logits.states_PD if isinstance(sample.logits, HeadLogits) else None
    stored = {name: store(sample, plan, kept[plan.targets].targets, states_PD) for name, plan in plans.items()}
    decoded = {
        name: stored[name].states[plan.states_field] for name, plan in plans.items() if plan.targets.kind == "hidden"
    }
    reference = refer(sample, kept, decoded, report=report)
    presets = {
        name: _measurement(name, plan.targets, sample, kept[plan.targets], stored[name], reference)
        for name, plan in plans.items()
    }
    return Measured(presets, kept, stored, reference)


def refer(
    sample: Sample,
    kept: Mapping[TargetsRecord, Reduced],
    decoded: Mapping[str, NDArray[np.float32]],
    *,
    report: Report | None = None,
) -> Reference:
    """Walk over the logits of ``sample`` for everything that needs the whole vocabulary (`Reference`)."""
    batches = list(batches_of(sample.num_positions))
    walk = _Walk(sample, {record: item.priors_HV for record, item in kept.items() if item.priors_HV is not None})
    lossless = _lossless(sample, decoded)
    with torch.inference_mode():
        for rows, logits_CV in sample.logits.chunks():
            log_t_CV = logits_CV.float().log_softmax(1)
            t_CV = log_t_CV.exp()
            walk.add_teacher(rows, t_CV)
            for name, states_PD in decoded.items():
                if name not in lossless and isinstance(sample.logits, HeadLogits):
                    walk.add_states(name, rows, t_CV, log_t_CV, sample.logits.of(states_PD[rows]))
            if report is not None:
                report(sample.num_positions + rows.stop)
    size = batches[0].stop
    for name in lossless:
        walk.kl[name], walk.sums[name] = 0.0, walk.sums[""]
    return Reference(
        walk.sums[""] / size,
        walk.cross,
        {name: walk.kl[name] / sample.num_positions for name in decoded},
        {name: walk.sums[name] / size for name in decoded},
    )


def _lossless(sample: Sample, decoded: Mapping[str, NDArray[np.float32]]) -> list[str]:
    """Return the presets whose decoded states equal the states, such as bfloat16 for a bfloat16 teacher."""
    if not isinstance(sample.logits, HeadLogits):
        return []
    return [name for name, states_PD in decoded.items() if np.array_equal(states_PD, sample.logits.states_PD)]


class _Walk:
    """Sums over the chunks of the second walk."""

    def __init__(self, sample: Sample, priors: Mapping[TargetsRecord, NDArray[np.float64]]) -> None:
        self.sample = sample
        self._size = next(batches_of(sample.num_positions)).stop
        self._num_batches = sum(1 for _ in batches_of(sample.num_positions))
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.kl: dict[str, float] = {}
        self.cross = {record: np.zeros(sample.num_positions) for record in priors}
        stacked = [np.stack([priors_HV[h] for priors_HV in priors.values()]) for h in (0, 1)] if priors else []
        self._log_priors_HRV = [np.log(np.maximum(p, np.exp(_LOG_TINY))).astype(np.float32) for p in stacked]

    def add_teacher(self, rows: slice, t_CV: Tensor) -> None:
        self._add_to_means("", rows, t_CV)
        if not self.cross:
            return
        for piece in split(rows, self.sample.half_block):
            other = self._log_priors_HRV[1 - int(self.sample.half_P[piece.start])]
            t_XV = t_CV[piece.start - rows.start : piece.stop - rows.start]
            found_XR = (t_XV @ torch.from_numpy(other.T).to(t_CV.device)).double().cpu().numpy()
            for column, cross_P in enumerate(self.cross.values()):
                cross_P[piece] = found_XR[:, column]

    def add_states(self, name: str, rows: slice, t_CV: Tensor, log_t_CV: Tensor, logits_CV: Tensor) -> None:
        log_q_CV = logits_CV.float().log_softmax(1)
        self._add_to_means(name, rows, log_q_CV.exp())
        terms_CV = torch.sub(log_t_CV, log_q_CV, out=log_q_CV).mul_(t_CV).masked_fill_(t_CV == 0, 0.0)
        self.kl[name] = self.kl.get(name, 0.0) + float(terms_CV.sum(dtype=torch.float64))

    def _add_to_means(self, name: str, rows: slice, probs_CV: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = np.zeros((self._num_batches, probs_CV.shape[1]))
        for piece in split(rows, self._size):
            batch = piece.start // self._size
            if batch < self._num_batches:
                part = probs_CV[piece.start - rows.start : piece.stop - rows.start]
                self.sums[name][batch] += part.sum(0).double().cpu().numpy()


def _measurement(
    name: str, record: TargetsRecord, sample: Sample, kept: Reduced, stored: Stored, reference: Reference
) -> PresetMeasurement:
    fidelity: dict[str, Any] = {"codec_kl": None, "within_tail_kl": None}
    if record.kind == "hidden":
        error = float(np.mean(np.linalg.norm(reference.state_means[name] - reference.means_QV, axis=1)))
        fidelity |= {"full_kl": {"full": reference.state_kl[name]}, "batch_mean_error": {"full": error}}
    elif record.num_samples:
        drawn = Rows.of_targets(stored.targets, sample.vocab_size)
        fidelity |= {"full_kl": {}, "batch_mean_error": {"samples": batch_mean_error(drawn, reference.means_QV)}}
    else:
        exact, decoded = (Rows.of_targets(targets, sample.vocab_size) for targets in (kept.targets, stored.targets))
        spreads = spreads_of(record, sample, kept, reference)
        assert kept.targets.entropy_P is not None  # reduced from whole logits
        fidelity = compare(exact, decoded, kept.targets.entropy_P, spreads, reference.means_QV)
    mass = None if record.kind == "sampled" else 1.0 if record.kind == "hidden" else _kept_mass(kept)
    count = sample.num_positions
    return PresetMeasurement(
        bytes_per_token=stored.bytes_per_token,
        bytes_interval=stored.interval,
        bytes_by_field=stored.bytes_by_field,
        kept_mass=mass,
        **fidelity,
        keep_tokens_per_s=count / kept.reduce_s,
        encode_tokens_per_s=count / stored.encode_s,
        decode_tokens_per_s=count / stored.decode_s,
    )


def _kept_mass(kept: Reduced) -> float:
    return float(-np.expm1(kept.targets.log_tail_P.astype(np.float64)).mean())


def spreads_of(record: TargetsRecord, sample: Sample, kept: Reduced, reference: Reference) -> dict[str, Spread]:
    """Return the ways to spread the tail mass of ``record``: ``uniform``, and ``prior`` if it has one."""
    spreads = {"uniform": Spread.uniform(sample.vocab_size, sample.num_positions)}
    if kept.priors_HV is not None:
        # Every position is measured with the prior of the other half.
        spreads["prior"] = Spread(kept.priors_HV[::-1], sample.half_P, reference.cross[record])
    return spreads


def compare(
    exact: Rows,
    decoded: Rows,
    entropy_P: NDArray[np.float32],
    spreads: Mapping[str, Spread],
    means_QV: NDArray[np.float64],
) -> dict[str, Any]:
    """Return the distances of decoded rows of kept ids from the teacher, by their names in `PresetMeasurement`."""
    renormalised = decoded.renormalised()
    uniform = Spread.uniform(exact.vocab_size, len(entropy_P))
    completed = {name: full_kl(exact, decoded, entropy_P, spread) for name, spread in spreads.items()}
    errors = {name: batch_mean_error(decoded, means_QV, spread) for name, spread in spreads.items()}
    return {
        "codec_kl": codec_kl(exact, decoded),
        "within_tail_kl": within_tail_kl(exact, entropy_P),
        "full_kl": {**completed, "renormalise": full_kl(exact, renormalised, entropy_P, uniform)},
        "batch_mean_error": {
            **errors,
            "renormalise": batch_mean_error(renormalised, means_QV),
            "drop": batch_mean_error(decoded, means_QV),
        },
    }
