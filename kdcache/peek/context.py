"""What every view begins with: one sequence of a cache, decoded, and how much of it is to be shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.errors import CorruptCacheError
from kdcache.peek.texts import Texts
from kdcache.schema import OUTPUTS_FIELD, OutputsRecord, Sequence, SequenceBatch
from kdcache.tasks import Task


@dataclass(frozen=True)
class PeekContext:
    """A sequence as it was read, and what was asked of it: see `kdcache.peek.peek`."""

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
    def outputs(self) -> OutputsRecord:
        """What the teacher's raw outputs are."""
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
        """Raise ``CorruptCacheError`` with the ``problem`` of a sequence that is not what its task says."""
        if not is_sound:
            raise CorruptCacheError(
                f"{self.cache.folder}, sequence {self.number}, task {self.task.name}: {problem}; "
                "kdcache verify --deep looks at all sequences"
            )

    def part(self, number: int) -> list[int]:
        """Return the tokens whose segment id is ``number``; there may be none."""
        self.check(self.batch.segment_ids_T is not None, "there are no segment_ids")
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
