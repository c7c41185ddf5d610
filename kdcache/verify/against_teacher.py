"""Compare a cache with its teacher, which is run again."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.cache.reader import as_cache
from kdcache.codecs import topk_codec
from kdcache.codecs.vectors import relative_errors
from kdcache.errors import CacheError, ConfigError, TeacherError
from kdcache.losses.from_cache import head_of
from kdcache.models.lm_head import same_head
from kdcache.progress import bar
from kdcache.schema import OUTPUTS_FIELD, Targets, WeightsIdentity
from kdcache.tasks import task_of
from kdcache.teachers import TeacherConfig, TeacherOutput, load_teacher, reduce_top_k
from kdcache.teachers.logits import hidden_to_numpy

#: Mean KL (nats) allowed between the teacher run again and the cache, in addition to the cost of the codec: in another
#: batch shape logits round differently.
_DTYPE_SLACK = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3, "float64": 1e-5}
#: Mean difference (nats) allowed of the gold token's log-probability. It finds targets of another position or another
#: text: their kept ids are mostly disjoint, and then the KL over shared ids and one bucket is small.
_GOLD_SLACK = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.02, "float64": 0.01}
#: Relative error allowed of the last hidden state, in addition to twice the error of its codec in the pilot.
_STATES_SLACK = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01, "float64": 1e-3}
#: Mean KL (nats) allowed where targets were made from stored hidden states: four times what int8 costs SmolLM2.
_STATES_KL = 2e-3
#: Relative error of raw outputs that a codec may cause.
_OUTPUTS_ERROR = {"bf16": 0.004, "fp16": 0.001, "int8": 0.02}
#: Standard errors by which the mean surprise of samples may miss its expectation.
_SAMPLES_ERRORS = 6
#: Positions whose logits are compared with their samples at once.
_CHUNK = 256


@dataclass(frozen=True)
class TeacherCheck:
    """The result of running the teacher again over ``num_sequences`` sequences of a cache."""

    num_sequences: int
    num_positions: int
    same_weights: bool
    mean_kl: float | None
    """Mean KL over kept ids and tail, teacher run now || cache, in nats; None where no ids are kept."""
    allowed_kl: float
    mean_gold_difference: float | None
    """Mean absolute difference of the gold token's log-probability; None where there are none."""
    allowed_gold_difference: float
    top1_agreement: float | None
    """Share of positions with the same most probable token; None where the cache holds samples alone."""
    states_error: float | None = None
    """Of targets of the kind hidden: root mean square of |stored - state now| / |state now|."""
    allowed_states_error: float | None = None
    same_head: bool | None = None
    """Of targets of the kind hidden: whether the stored LM head is the teacher's."""
    samples_excess: float | None = None
    """Of samples: their mean surprise under the teacher run now less its expectation, in nats; 0 on average."""
    allowed_samples_excess: float | None = None
    outputs_error: float | None = None
    """Of raw outputs: root mean square of |stored - now| / |now|."""
    allowed_outputs_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the cache is this teacher's."""
        same_targets = (self.mean_kl or 0.0) <= self.allowed_kl
        same_gold = (self.mean_gold_difference or 0.0) <= self.allowed_gold_difference
        same_outputs = self.outputs_error is None or self.outputs_error <= (self.allowed_outputs_error or 0.0)
        same_states = self.states_error is None or self.states_error <= (self.allowed_states_error or 0.0)
        same_samples = self.samples_excess is None or abs(self.samples_excess) <= (self.allowed_samples_excess or 0.0)
        same_teacher = self.same_weights and self.same_head is not False
        return same_teacher and same_targets and same_gold and same_states and same_samples and same_outputs

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "ok": self.ok}


def verify_against_teacher(
    cache: Cache | str | os.PathLike[str],
    num_sequences: int,
    *,
    teacher: TeacherConfig | None = None,
    progress: bool = True,
) -> TeacherCheck:
    """Run the teacher over ``num_sequences`` sequences spread over ``cache`` and compare its answers with the cache.

    ``teacher`` says where to load it from, by default the name and dtype in the manifest. Raises ``TeacherError`` when
    it cannot be loaded, or when the cache's teacher has no weights that could be run here.
    """
    cache = as_cache(cache)
    if num_sequences < 1:
        raise CacheError(f"at least one sequence has to be checked, found {num_sequences}")
    record = cache.manifest.teacher
    dtype = _dtype_of(cache)
    config = teacher or TeacherConfig(model=record.name, dtype=dtype, revision=record.revision)
    if config.dtype == "auto":
        config = config.model_copy(update={"dtype": dtype})
    try:
        runner = load_teacher(config, cache.vocab_size, task_of(cache.manifest.task), cache.manifest.outputs)
    except TeacherError as error:
        raise TeacherError(f"{error}; say where the teacher is with --teacher") from None
    if runner.vocab_size < cache.vocab_size:
        raise TeacherError(
            f"{config.model} has {runner.vocab_size} token ids, and the cache uses {cache.vocab_size}, so it is not "
            "its teacher; say where the teacher is with --teacher"
        )
    chosen = np.unique(np.linspace(0, len(cache) - 1, num_sequences).astype(int)).tolist()
    layer = runner.num_layers if cache.manifest.targets.kind == "hidden" else None
    divergences, gold, agree, states, surprises, outputs = [], [], [], [], [], []
    raw = (OUTPUTS_FIELD,) if cache.manifest.outputs is not None else ()
    with bar(len(chosen), "teacher", "seq", enabled=progress) as meter:
        for index in chosen:
            stored = cache.read([index], fields=raw)
            output = runner.run(stored.sequences(), [] if layer is None else [layer])
            if output.outputs_PC is not None:
                outputs.append(relative_errors(stored.hidden[OUTPUTS_FIELD], hidden_to_numpy(output.outputs_PC)))
            meter.update()
            if cache.manifest.targets.kind == "outputs":
                continue
            again = reduce_top_k(output.logits, output.labels_P, max(cache.manifest.top_k, 1))
            if cache.manifest.top_k:
                divergences.append(shared_kl(again, stored.targets))
                agree.append(again.ids_PK[:, 0] == stored.targets.top1_ids_P)
            if layer is not None:
                states.append(relative_errors(stored.hidden["last"], hidden_to_numpy(output.hidden[layer])))
            if stored.targets.samples is not None:
                surprises.append(_surprises(output, stored.targets))
            if again.gold_logprob_P is not None and stored.targets.gold_logprob_P is not None:
                gold.append(np.abs(again.gold_logprob_P - stored.targets.gold_logprob_P))
    known = [values[~np.isnan(values)] for values in gold]
    return TeacherCheck(
        num_sequences=len(chosen),
        num_positions=int((cache.lengths_N[chosen]).sum()),
        same_weights=runner.record.weights_sha256 == record.weights_sha256,
        mean_kl=_mean(divergences),
        allowed_kl=_allowed_kl(cache),
        mean_gold_difference=_mean(known) if any(map(len, known)) else None,
        allowed_gold_difference=_GOLD_SLACK[dtype],
        top1_agreement=_mean(agree),
        states_error=float(np.sqrt((np.concatenate(states) ** 2).mean())) if states else None,
        allowed_states_error=_allowed_states_error(cache) if states else None,
        same_head=same_head(head_of(cache), runner.head) if states else None,
        outputs_error=float(np.sqrt((np.concatenate(outputs) ** 2).mean())) if outputs else None,
        allowed_outputs_error=_allowed_outputs_error(cache) if outputs else None,
        **_samples_excess(surprises, _DTYPE_SLACK[dtype]),
    )


def _dtype_of(cache: Cache) -> str:
    """Return the dtype that the teacher ran in; raises ``TeacherError`` for one that did not run from its weights."""
    record = cache.manifest.teacher
    if isinstance(record.identity, WeightsIdentity) and record.backend == "transformers":
        return record.identity.dtype
    origin = {"weights": "was run", "endpoint": "was asked", "import": "was imported"}[record.identity.kind]
    raise TeacherError(
        f"{cache.folder}: the teacher {record.name} {origin} by backend {record.backend!r}, so its logits cannot be "
        "made again here; check the stored targets alone with kdcache verify --deep"
    )


def _mean(values: list[NDArray[Any]]) -> float | None:
    return float(np.concatenate(values).mean()) if values else None


def _allowed_kl(cache: Cache) -> float:
    """Return the KL that the codec costs, plus that of the codecs of the caches that this one was transcoded from."""
    manifest = cache.manifest
    allowed = _DTYPE_SLACK[_dtype_of(cache)]
    if manifest.targets.kind != "outputs":
        allowed += topk_codec(manifest.field("targets").codec).kl_bound
    links = manifest.provenance.get("transcoded")
    for link in links if isinstance(links, list) else []:
        kind, codec = (link.get("kind"), link.get("codec")) if isinstance(link, dict) else (None, None)
        if kind == "hidden" and manifest.targets.kind != "hidden":
            allowed += _STATES_KL
        try:
            allowed += topk_codec(codec).kl_bound if isinstance(codec, dict) else 0.0
        except ConfigError:
            continue  # provenance is for people and may say anything
    return allowed


def _allowed_states_error(cache: Cache) -> float:
    pilot = cache.manifest.field(cache.manifest.states_field).relative_error or 0.0
    return 2 * pilot + _STATES_SLACK[_dtype_of(cache)]


def _allowed_outputs_error(cache: Cache) -> float:
    codec = str(cache.manifest.field(OUTPUTS_FIELD).codec.get("name"))
    return _OUTPUTS_ERROR.get(codec, 0.0) + _STATES_SLACK[_dtype_of(cache)]


def _surprises(output: TeacherOutput, targets: Targets) -> NDArray[np.float64]:
    """Return the surprise of the samples of each position less its expectation, and the variance of that, [2, P].

    Surprise is the mean over the samples of -log t, where t is the teacher's distribution outside the kept ids, from
    which they were sampled. Its expectation is the entropy of t for every seed; samples from any other distribution are
    more surprising.
    """
    assert targets.samples is not None
    counts_PJ, ids_PJ = (
        torch.from_numpy(a.astype(np.int64)) for a in (targets.samples.counts_PJ, targets.samples.ids_PJ)
    )
    kept_PK, found = torch.from_numpy(targets.ids_PK.astype(np.int64)), []
    for start in range(0, targets.num_positions, _CHUNK):
        rows = slice(start, min(start + _CHUNK, targets.num_positions))
        logits_CV = output.logits(rows.start, rows.stop).cpu().double().scatter(1, kept_PK[rows], -torch.inf)
        surprise_CV = -logits_CV.log_softmax(1)
        probs_CV, counts_CJ = (-surprise_CV).exp(), counts_PJ[rows].double()
        entropy_C = torch.special.entr(probs_CV).sum(1)
        squares_C = torch.where(probs_CV > 0, probs_CV * surprise_CV**2, 0.0).sum(1)
        sampled_C = torch.where(counts_CJ > 0, counts_CJ * surprise_CV.gather(1, ids_PJ[rows]), 0.0).sum(1)
        num_C = counts_CJ.sum(1)
        sums_2C = torch.stack([sampled_C / num_C - entropy_C, (squares_C - entropy_C**2).clamp(min=0) / num_C])
        found.append(torch.where(num_C > 0, sums_2C, 0.0))  # where everything is kept there is nothing to draw
    surprises: NDArray[np.float64] = torch.cat(found, 1).numpy()
    return surprises


def _samples_excess(surprises: list[NDArray[np.float64]], slack: float) -> dict[str, float]:
    if not surprises:
        return {}
    excess_P, variance_P = np.concatenate(surprises, axis=1)
    error = float(np.sqrt(variance_P.sum())) / len(excess_P)
    return {"samples_excess": float(excess_P.mean()), "allowed_samples_excess": _SAMPLES_ERRORS * error + slack}


def shared_kl(first: Targets, second: Targets) -> NDArray[np.float64]:
    """Return KL(first || second), [P] nats, over the ids that both keep and one bucket for all others.

    A coarsening, hence a lower bound of the full KL; ids that only one keeps (ties at rank K) are in the bucket. If
    both keep the same ids it equals `kdcache.losses.tails.bucket_kl`, which a test compares.
    """
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
    """Return the log-probability of each of ``ids_PK`` in ``targets``, and whether it is kept there."""
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
    """Return the mass outside the shared ids: the stored tail if all ids are shared, otherwise one minus their mass."""
    stored = np.exp(targets.log_tail_P.astype(np.float64))
    return np.where(shared_PK.all(axis=1), stored, np.maximum(1 - head_P, 1e-12))
