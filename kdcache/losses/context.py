"""What all rows of a cache have in common, for the losses: facts and tensors that no row repeats.

A row of the teacher (`TeacherRows`) means different things in different caches: the most probable ids, samples, or the
token that belongs to a hidden state. Losses ask this record which it is, and find here what exists once per cache: the
tail prior and the teacher's LM head. A plain record, so that losses know nothing of caches. The default is the common
case, a top-k cache whose rows all keep K ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from kdcache.errors import CorruptCacheError
from kdcache.models.lm_head import LMHead
from kdcache.schema import Kind, OutputsRecord

_HOLDS: dict[Kind, str] = {
    "top-k": "the most probable ids of each position",
    "sampled": "samples from the teacher's distribution",
    "hybrid": "the most probable ids of each position and samples from the others",
    "hidden": "the teacher's last hidden state at each position",
    "outputs": "the teacher's raw outputs at each position, no distribution",
}


@dataclass(frozen=True, eq=False)
class TeacherContext:
    """What a cache says about all of its rows.

    ``kind`` of the targets; ``vocab_size`` the teacher's true vocabulary V (None: the student's); ``is_ragged``
    whether rows keep different numbers of ids; ``temperatures`` [G] those of ``TeacherRows.log_tails_PG``;
    ``prior_V`` the mean probability of every id while it is not kept (None: not stored); ``head`` the teacher's LM
    head over V ids (None: not stored). ``num_layers`` of the teacher, and ``layer_widths`` of those layers whose
    hidden states are stored, by number (0: the embeddings, ``num_layers``: after the final norm). ``num_kept`` is how
    many ids at the front of every row are the most probable ones, with their exact probabilities; who reads samples needs
    it (0: none, or unknown). ``outputs`` says what the raw outputs of the teacher are (None: not stored). Raises
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

    @property
    def holds(self) -> str:
        """What the cache holds, in words, for messages."""
        return f"{self.kind} targets ({_HOLDS[self.kind]})"

    @property
    def is_sampled(self) -> bool:
        """Whether rows are an unbiased estimate of the teacher's distribution rather than a part of it."""
        return self.kind in ("sampled", "hybrid")

    @property
    def has_pads(self) -> bool:
        """Whether rows may end in places that stand for nothing (log-probability -inf, the row's first id again)."""
        return self.is_ragged or self.is_sampled

    @cached_property
    def prior_terms_V(self) -> Tensor:
        """Prior x log prior of each id, float64, 0 where the prior is."""
        assert self.prior_V is not None
        return torch.special.xlogy(self.prior_V.double(), self.prior_V.double())

    def grid_index(self, temperature: float) -> int | None:
        """Return the column of ``TeacherRows.log_tails_PG`` that belongs to ``temperature``; None if there is none."""
        near = (i for i, t in enumerate(self.temperatures) if math.isclose(t, temperature, rel_tol=1e-6))
        return next(near, None)

    def _check_size(self, what: str, size: int | None) -> None:
        if size is not None and self.vocab_size is not None and size != self.vocab_size:
            raise CorruptCacheError(
                f"the {what} of the cache has {size} entries, expected one for each of the {self.vocab_size} ids of "
                "the teacher's vocabulary; run kdcache verify on the cache"
            )
