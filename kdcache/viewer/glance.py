"""What every view begins with: one sequence of a cache, decoded, and how much of it is to be shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kdcache.cache import Cache
from kdcache.schema import OUTPUTS_FIELD, Sequence, SequenceBatch
from kdcache.tasks import Task
from kdcache.viewer.texts import Texts


@dataclass(frozen=True)
class Glance:
    """A sequence as it was read, and what was asked of it: see `kdcache.viewer.peek`."""

    cache: Cache
    task: Task
    texts: Texts
    batch: SequenceBatch
    positions: tuple[int, ...]
    select: str
    count: int
    top: int
    context: int

    @property
    def number(self) -> int:
        """Number of the sequence in the cache."""
        return self.batch.indices[0]

    @property
    def sequence(self) -> Sequence:
        """The sequence as models are fed it."""
        return self.batch.sequences()[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """Its row of the per-sequence table."""
        return self.cache.metadata(self.number)

    @property
    def outputs_PC(self) -> Any:
        """The teacher's raw outputs, [P, C] float32, of tasks that have some."""
        return self.batch.hidden[OUTPUTS_FIELD]

    def part(self, number: int) -> list[int]:
        """Return the tokens whose segment id is ``number``; there may be none."""
        ids: list[int] = self.batch.tokens_T[self.batch.segment_ids_T == number].tolist()
        return ids


@dataclass(frozen=True)
class View:
    """What can be seen of a sequence; ``metadata`` is its row of the per-sequence table."""

    sequence: int
    metadata: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)
