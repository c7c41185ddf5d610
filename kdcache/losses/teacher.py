"""The teacher's rows of a batch, and what all rows of a cache have in common.

`TeacherRows` holds one row per real position, padding already removed. `TeacherContext` holds what exists once per
cache: the kind of targets, the tail prior, the teacher's LM head. Both are plain records, independent of caches,
collators and devices.

Shape suffixes: P flat positions, K kept ids, G grid temperatures, D width of the teacher, V its vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.models.lm_head import LMHead
from kdcache.schema import SCALARS, Kind, OutputsRecord
from kdcache.schema.records import Scalar

BATCH_KEYS = {
    "ids_PK": "teacher_ids",
    "logprobs_PK": "teacher_logprobs",
    "log_tail_P": "teacher_log_tail",
    "labels_P": "labels",
    "loss_mask_P": "loss_mask",
}
OPTIONAL_BATCH_KEYS = {
    "log_tails_PG": "teacher_log_tails",
    "hidden_PD": "teacher_hidden",
    "gold_logprob_P": "teacher_gold_logprob",
    "entropy_P": "teacher_entropy",
}


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's targets at P positions: its top K ids and what else the losses read.

    ``ids_PK`` int64, distinct within a row, most probable first; ``logprobs_PK`` their log-probabilities over the
    whole vocabulary; ``log_tail_P`` the log of the mass outside them (-inf: none); ``labels_P`` int64 gold tokens or
    classes; ``loss_mask_P`` bool, True where a position counts. Where `TeacherContext.has_pads`, padding repeats the
    row's first id with log-probability -inf.

    Optional, since not every cache has them: ``log_tails_PG``, the log of the mass outside the kept ids at each
    temperature of the grid; ``hidden_PD``, the teacher's last hidden state; ``gold_logprob_P``, the teacher's
    log-probability of the label; ``entropy_P``, the entropy of the full distribution, in nats.
    """

    ids_PK: Tensor
    logprobs_PK: Tensor
    log_tail_P: Tensor
    entropy_P: Tensor | None
    labels_P: Tensor
    loss_mask_P: Tensor
    log_tails_PG: Tensor | None = None
    hidden_PD: Tensor | None = None
    gold_logprob_P: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: Mapping[str, Tensor]) -> TeacherRows:
        """Take the rows from a collated training batch; raises ``ConfigError``, naming missing keys."""
        missing = [key for key in BATCH_KEYS.values() if key not in batch]
        if missing:
            raise ConfigError(
                f"a training batch must hold {', '.join(BATCH_KEYS.values())}; {', '.join(missing)} not found among "
                f"{', '.join(batch) or 'no keys'}. Use the collator of the cache's task, and with a Trainer "
                "of your own set remove_unused_columns=False"
            )
        values: dict[str, Any] = {name: batch.get(key) for name, key in (BATCH_KEYS | OPTIONAL_BATCH_KEYS).items()}
        return cls(**values)

    @property
    def num_positions(self) -> int:
        """Number of rows, P."""
        return self.ids_PK.shape[0]

    @property
    def top_k(self) -> int:
        """Number of kept ids per row, K."""
        return self.ids_PK.shape[1]

    def require(self, name: str) -> Tensor:
        """Return an optional field; raises ``ConfigError``, naming its key, if the batch did not have it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ConfigError(
                f"the loss needs {OPTIONAL_BATCH_KEYS[name]} in every training batch, found none; read this field of "
                "the cache too, and use the collator of the cache's task"
            )
        return value

    def slice(self, start: int, stop: int) -> TeacherRows:
        """Return rows ``start`` to ``stop``, as views."""
        return self._each(lambda tensor: tensor[start:stop])

    def select(self, rows: Tensor) -> TeacherRows:
        """Return the rows with the given int64 indices, in that order."""
        return self._each(lambda tensor: tensor.index_select(0, rows))

    def to(self, device: torch.device | str) -> TeacherRows:
        """Return the rows on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def with_dtype(self, dtype: torch.dtype) -> TeacherRows:
        """Return the rows with their log-probabilities and entropies in ``dtype``."""
        return self._each(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TeacherRows:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return TeacherRows(**changed)


_HOLDS: dict[Kind, str] = {
    "top-k": "the most probable ids of each position",
    "sampled": "samples from the teacher's distribution",
    "hybrid": "the most probable ids of each position and samples from the others",
    "hidden": "the teacher's last hidden state at each position",
    "outputs": "the teacher's raw outputs at each position, no distribution",
}

Fact = Literal["entropy", "gold_logprob", "vocabulary_probabilities", "tail_prior", "lm_head", "outputs"]
#: What each fact is called, and what to do where the cache lacks it.
_FACTS: dict[Fact, tuple[str, str]] = {
    "entropy": (
        "the entropy of the teacher's distribution",
        "dump with a teacher that returns full logits, such as backend transformers",
    ),
    "gold_logprob": (
        "the teacher's log-probability of the gold token",
        "dump with a teacher that scores given tokens, such as backend transformers",
    ),
    "vocabulary_probabilities": (
        "probabilities over the whole vocabulary, and those of this cache are renormalised over the kept ids",
        "use forward_kl with tail=renormalise, logits_mse or ranking, or a cache whose teacher returns full logits",
    ),
    "tail_prior": ("the tail prior", "dump with targets.tail_prior=true"),
    "lm_head": ("the teacher's last hidden state and LM head", "dump with --targets hidden"),
    "outputs": ("the teacher's raw outputs", "dump with a task that stores them (embedding, ranking, regression)"),
}


@dataclass(frozen=True, eq=False)
class TeacherContext:
    """Properties that all positions of a cache share; `has` tells what the cache stores.

    ``kind`` of the targets; ``vocab_size`` the teacher's true vocabulary V (None: the student's); ``is_ragged`` whether
    rows keep different numbers of ids; ``temperatures`` [G] those of ``TeacherRows.log_tails_PG``; ``prior_V`` the mean
    probability of every id while it is not kept (None: not stored); ``head`` the teacher's LM head over V ids (None:
    not stored). ``num_layers`` of the teacher, and ``layer_widths`` of the layers whose hidden states are stored, by
    number (0: the embeddings, ``num_layers``: after the final norm). ``num_kept`` is the number of ids at the front of
    every row that are kept with their exact probabilities, before the samples (0: none, or unknown). ``outputs``
    describes the raw outputs of the teacher (None: not stored). ``scalars`` are the numbers stored of every position,
    ``probabilities`` whether those of the kept ids are over the vocabulary or renormalised over the kept ids. Raises
    ``CorruptCacheError`` when prior or head are of another vocabulary.
    """

    kind: Kind = "top-k"
    vocab_size: int | None = None
    is_ragged: bool = False
    temperatures: tuple[float, ...] = ()
    prior_V: Tensor | None = None
    head: LMHead | None = None
    num_layers: int = 0
    layer_widths: Mapping[int, int] = field(default_factory=dict)
    num_kept: int = 0
    outputs: OutputsRecord | None = None
    scalars: tuple[Scalar, ...] = SCALARS
    probabilities: Literal["vocabulary", "kept"] = "vocabulary"

    def __post_init__(self) -> None:
        self._check_size("tail prior", None if self.prior_V is None else len(self.prior_V))
        self._check_size("LM head", None if self.head is None else self.head.vocab_size)

    def to(self, device: torch.device | str) -> TeacherContext:
        """Return the context on ``device``: itself where it is there already."""
        device = torch.device(device)
        head = self.head
        tensors = (self.prior_V, *((head.weight_VD, head.bias_V) if head is not None else ()))
        if all(tensor is None or tensor.device == device for tensor in tensors):
            return self
        prior_V = None if self.prior_V is None else self.prior_V.to(device)
        return replace(self, prior_V=prior_V, head=None if head is None else head.to(device))

    def has(self, fact: Fact) -> bool:
        """Return whether the cache stores ``fact``."""
        match fact:
            case "entropy" | "gold_logprob":
                return fact in self.scalars
            case "vocabulary_probabilities":  # a hidden state gives the whole distribution
                return self.head is not None or self.probabilities == "vocabulary"
            case "tail_prior":
                return self.prior_V is not None
            case "lm_head":
                return self.head is not None
            case "outputs":
                return self.outputs is not None

    def lacks(self, *facts: Fact) -> str | None:
        """Return the first of ``facts`` that is missing and what to do about it, for an error; None if none is."""
        for fact in facts:
            if not self.has(fact):
                what, advice = _FACTS[fact]
                return f"it needs {what}, which the cache does not have; {advice}"
        return None

    @property
    def holds(self) -> str:
        """Description of what the cache stores, for messages."""
        return f"{self.kind} targets ({_HOLDS[self.kind]})"

    @property
    def is_sampled(self) -> bool:
        """Whether rows are an unbiased estimate of the teacher's distribution."""
        return self.kind in ("sampled", "hybrid")

    @property
    def has_pads(self) -> bool:
        """Whether rows may end in padding (the row's first id again, with log-probability -inf)."""
        return self.is_ragged or self.is_sampled

    @cached_property
    def prior_terms_V(self) -> Tensor:
        """Prior x log prior of each id, float64, 0 where the prior is."""
        assert self.prior_V is not None
        return torch.special.xlogy(self.prior_V.double(), self.prior_V.double())

    def grid_index(self, temperature: float) -> int | None:
        """Return the column of ``TeacherRows.log_tails_PG`` for ``temperature``; None if it is not stored."""
        near = (i for i, t in enumerate(self.temperatures) if math.isclose(t, temperature, rel_tol=1e-6))
        return next(near, None)

    def _check_size(self, what: str, size: int | None) -> None:
        if size is not None and self.vocab_size is not None and size != self.vocab_size:
            raise CorruptCacheError(
                f"the {what} of the cache has {size} entries, expected one for each of the {self.vocab_size} ids of "
                "the teacher's vocabulary; run kdcache verify on the cache"
            )
