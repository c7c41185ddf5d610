"""Checks that need the teacher: does it, run again, say what the cache says?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.codecs import topk_codec
from kdcache.codecs.hidden import relative_errors
from kdcache.errors import CacheError, TeacherError
from kdcache.progress import bar
from kdcache.schema import Sequence, SequenceBatch, Targets
from kdcache.teachers import TeacherConfig, keep_top_k, load_teacher
from kdcache.teachers.huggingface import hidden_to_numpy

#: Mean KL (nats) allowed between the teacher run again and the cache, beside what the codec costs: what another batch
#: shape changes in the teacher's own arithmetic.
_DTYPE_SLACK = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3, "float64": 1e-5}
#: Mean difference (nats) allowed of the gold token's log-probability. It is what finds rows of another position or
#: another text: their few kept ids are mostly disjoint, and a KL over shared ids and one bucket then says little.
_GOLD_SLACK = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.02, "float64": 0.01}


#: Relative error allowed of the last hidden state, beside twice what its codec cost the pilot.
_STATES_SLACK = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01, "float64": 1e-3}


@dataclass(frozen=True)
class TeacherCheck:
    """What came of running the teacher again over ``num_sequences`` of a cache."""

    num_sequences: int
    num_positions: int
    same_weights: bool
    mean_kl: float
    """Mean KL over kept ids and tail, teacher run now || cache, in nats; 0 where no ids are kept."""
    allowed_kl: float
    mean_gold_difference: float
    """Mean absolute difference of the gold token's log-probability."""
    allowed_gold_difference: float
    top1_agreement: float
    """Share of positions with the same most probable token (where the cache holds draws alone, the most drawn)."""
    states_error: float | None = None
    """Of targets of the kind hidden: root mean square of |stored - state now| / |state now|."""
    allowed_states_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the cache is this teacher's."""
        same_targets = self.mean_kl <= self.allowed_kl and self.mean_gold_difference <= self.allowed_gold_difference
        same_states = self.states_error is None or self.states_error <= (self.allowed_states_error or 0.0)
        return self.same_weights and same_targets and same_states

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "ok": self.ok}


def verify_against_teacher(
    cache: Cache, num_sequences: int, *, teacher: TeacherConfig | None = None, progress: bool = True
) -> TeacherCheck:
    """Run the teacher over ``num_sequences`` sequences spread over ``cache`` and compare what it says with the cache.

    ``teacher`` is where to load it from, by default the name and dtype in the manifest. Raises ``TeacherError`` when
    it cannot be loaded.
    """
    record = cache.manifest.teacher
    config = teacher or TeacherConfig(model=record.name, dtype=record.dtype, revision=record.revision)
    if config.dtype == "auto":
        config = config.model_copy(update={"dtype": record.dtype})
    if num_sequences < 1:
        raise CacheError(f"at least one sequence has to be checked, found {num_sequences}")
    try:
        runner = load_teacher(config, cache.vocab_size)
    except TeacherError as error:
        raise TeacherError(f"{error}; say where the teacher lies with --teacher") from None
    chosen = np.unique(np.linspace(0, len(cache) - 1, num_sequences).astype(int)).tolist()
    layer = record.num_layers if cache.manifest.targets.kind == "hidden" else None
    divergences, gold, agree, states = [], [], [], []
    with bar(len(chosen), "teacher", "seq", enabled=progress) as meter:
        for index in chosen:
            stored = cache.read([index])
            output = runner.run([_sequence(stored)], [] if layer is None else [layer])
            again = keep_top_k(output.logits, output.labels_P, max(cache.manifest.top_k, 1))
            divergences.append(bucket_kl(again, stored.targets))
            if layer is not None:
                states.append(relative_errors(stored.hidden["last"], hidden_to_numpy(output.hidden[layer])))
            gold.append(np.abs(again.gold_logprob_P - stored.targets.gold_logprob_P))
            agree.append(again.ids_PK[:, 0] == stored.targets.top1_ids_P)
            meter.update()
    return TeacherCheck(
        num_sequences=len(chosen),
        num_positions=sum(map(len, gold)),
        same_weights=runner.record.weights_sha256 == record.weights_sha256,
        mean_kl=float(np.concatenate(divergences).mean()),
        allowed_kl=topk_codec(cache.manifest.field("targets").codec).kl_bound + _DTYPE_SLACK[record.dtype],
        mean_gold_difference=float(np.concatenate(gold).mean()),
        allowed_gold_difference=_GOLD_SLACK[record.dtype],
        top1_agreement=float(np.concatenate(agree).mean()),
        states_error=float(np.sqrt((np.concatenate(states) ** 2).mean())) if states else None,
        allowed_states_error=_allowed_states_error(cache) if states else None,
    )


def _allowed_states_error(cache: Cache) -> float:
    pilot = cache.manifest.field(cache.manifest.states_field).relative_error or 0.0
    return 2 * pilot + _STATES_SLACK[cache.manifest.teacher.dtype]


def _sequence(batch: SequenceBatch) -> Sequence:
    return Sequence(batch.indices[0], batch.tokens_T, batch.loss_mask_P, batch.segment_ids_T)


def bucket_kl(first: Targets, second: Targets) -> NDArray[np.float64]:
    """Return KL(first || second), [P] nats, over the ids that both keep and one bucket for all others.

    A coarsening, hence a lower bound of the full KL; ids that only one keeps (ties at rank K) are in the bucket.
    """
    if second.top_k == 0:  # one bucket for everything
        return np.zeros(first.num_positions)
    p_PK = np.exp(first.logprobs_PK.astype(np.float64))
    log_q_PK, shared_PK = _look_up(first.ids_PK, second)
    p_head = np.where(shared_PK, p_PK, 0.0)
    q_head = np.where(shared_PK, np.exp(log_q_PK), 0.0)
    head = np.where(p_head > 0, p_head * (first.logprobs_PK - log_q_PK), 0.0).sum(axis=1)
    p_tail, q_tail = (_tail(mass.sum(axis=1), t, shared_PK) for mass, t in ((p_head, first), (q_head, second)))
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = np.where(p_tail > 0, p_tail * (np.log(p_tail) - np.log(q_tail)), 0.0)
    result: NDArray[np.float64] = head + np.nan_to_num(tail, nan=0.0, posinf=np.inf)
    return result


def _look_up(ids_PK: NDArray[Any], targets: Targets) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the log-probability that ``targets`` gives to each of ``ids_PK``, and whether it keeps the id."""
    span = int(max(ids_PK.max(), targets.ids_PK.max())) + 1
    row = np.arange(len(ids_PK), dtype=np.int64)[:, None] * span
    kept_PK = ~np.isneginf(targets.logprobs_PK)  # not the padding of ragged rows, which repeats an id
    keys = (targets.ids_PK.astype(np.int64) + row)[kept_PK]
    order = np.argsort(keys)
    wanted = ids_PK.astype(np.int64) + row
    place = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    found = keys[order][place] == wanted
    values = targets.logprobs_PK[kept_PK].astype(np.float64)[order][place]
    return np.where(found, values, 0.0), found


def _tail(head_P: NDArray[np.float64], targets: Targets, shared_PK: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mass outside the shared ids: the exact stored tail where all ids are shared, else what they leave."""
    stored = np.exp(targets.log_tail_P.astype(np.float64))
    return np.where(shared_PK.all(axis=1), stored, np.maximum(1 - head_P, 1e-12))
