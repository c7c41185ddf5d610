"""`PeekContext`, one decoded sequence of a cache, from which a task makes a `View`: what is shown of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.errors import CorruptCacheError
from kdcache.peek.texts import Texts
from kdcache.schema import OUTPUTS_FIELD, OutputsRecord, Sequence, SequenceBatch, Targets
from kdcache.tasks import Task


@dataclass(frozen=True)
class PeekContext:
    """One decoded sequence and the options of `kdcache.peek.peek_cache`; ``num_around`` is its ``context``."""

    cache: Cache
    task: Task
    texts: Texts
    batch: SequenceBatch
    positions: tuple[int, ...]
    select: str
    count: int
    top: int
    num_around: int

    @property
    def number(self) -> int:
        """Number of the sequence in the cache."""
        return self.batch.indices[0]

    @property
    def sequence(self) -> Sequence:
        """The sequence that models are fed."""
        return self.batch.sequences()[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """Its row of the per-sequence table."""
        return self.cache.metadata(self.number)

    @property
    def outputs(self) -> OutputsRecord:
        """Describe the teacher's raw outputs; raises ``CorruptCacheError`` where there are none."""
        record = self.cache.manifest.outputs
        self.check(record is not None, "there are no raw outputs")
        assert record is not None
        return record

    @property
    def outputs_PC(self) -> NDArray[np.float32]:
        """The teacher's raw outputs, [P, C]."""
        self.check(OUTPUTS_FIELD in self.batch.hidden, "there are no raw outputs")
        return self.batch.hidden[OUTPUTS_FIELD]

    def check(self, is_sound: bool, problem: str) -> None:
        """Raise ``CorruptCacheError`` with the ``problem`` unless the sequence ``is_sound`` for its task."""
        if not is_sound:
            raise CorruptCacheError(
                f"{self.cache.folder}, sequence {self.number}, task {self.task.name}: {problem}; "
                "run kdcache verify --deep, which checks all sequences"
            )

    def part(self, number: int) -> list[int]:
        """Return the tokens whose segment id is ``number``, which may be none."""
        self.check(self.batch.segment_ids_T is not None, "there are no segment_ids")
        ids: list[int] = self.batch.tokens_T[self.batch.segment_ids_T == number].tolist()
        return ids


def gold_logprob(targets: Targets, row: int, label: int) -> float | None:
    """Return the teacher's log-probability of ``label`` at a position; None where the cache does not store it."""
    if targets.gold_logprob_P is not None:
        return float(targets.gold_logprob_P[row])
    (found,) = np.nonzero((targets.ids_PK[row] == label) & (targets.logprobs_PK[row] > -np.inf))
    return float(targets.logprobs_PK[row, found[0]]) if len(found) else None


def probability(logprob: float | None) -> float | None:
    """Return exp(``logprob``); None for None."""
    return None if logprob is None else float(np.exp(logprob))


def shown(value: float | None) -> str:
    """Return a probability as text of fixed width."""
    return "unknown" if value is None else f"{value:7.4f}"


def one_line(text: str) -> str:
    """Return ``text`` with its line breaks as signs."""
    return text.replace("\n", "\u23ce")


def short(text: str, length: int = 60) -> str:
    """Return at most ``length`` characters of ``text``."""
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True)
class View:
    """What is shown of a sequence. A view of another kind is a frozen dataclass that adds fields.

    ``metadata`` is the sequence's row of the per-sequence table.
    """

    sequence: int
    metadata: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    def render(self) -> str:
        """Return the view as text for a terminal; by default each field of its own on a line."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return "\n".join(f"{name}: {value}" for name, value in own.items() if name not in ("sequence", "metadata"))
