"""The tail prior: for every id of the vocabulary its mean probability while it is not among the kept ids.

One vector per cache. It says what the tail looks like on average, which a flat tail does not: at K = 32 it is closer to
the teacher than twice as many ids with a flat tail. It is a sum over shards, so a writer adds each shard to the file
*before* it commits the shard, and the file names the shards that it holds: a shard that is made again after a crash is
in it already, and its content is the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import layout
from kdcache.cache.shard_file import pack, unpack
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.schema import ArrayRecord, Manifest, ObjectRecord
from kdcache.storage.folder import Folder


class TailSum(NamedTuple):
    """Sum over ``num_positions`` of each id's probability where it is not kept, [V]."""

    sum_V: NDArray[np.float64]
    num_positions: int


_ADVICE = "shards do not hold what they add to it: fetch the file again, or dump into another output"

_ARRAYS = {
    "table/probability": ArrayRecord(name="probability", dtype="float32", rows="table"),
    "table/shards": ArrayRecord(name="shards", dtype="int32", rows="table"),
    "table/num_positions": ArrayRecord(name="num_positions", dtype="int64", rows="table"),
}


class TailPrior:
    """The prior of the cache in ``folder`` while it is written, ``committed`` shards of it already.

    Raises ``CacheError`` when the file lacks the share of a committed shard: only the teacher could make it again.
    """

    def __init__(self, folder: Folder, vocab_size: int, committed: Collection[int]) -> None:
        self._folder = folder
        self._probability_V = np.zeros(vocab_size, dtype=np.float32)
        self._num_positions: dict[int, int] = {}
        if not committed:  # a file that is there is of shards that are made again
            return
        try:
            self._probability_V, self._num_positions = _read(folder, vocab_size)
        except CorruptCacheError as error:
            raise CacheError(f"{error}; {_ADVICE}") from None
        lost = sorted(set(committed) - set(self._num_positions))
        if lost:
            raise CacheError(
                f"{folder}, file {layout.TAIL_PRIOR} lacks the share of {len(lost)} committed shards, the first is "
                f"{lost[0]}; {_ADVICE}"
            )

    def add(self, shard: int, tail_sum: TailSum | None) -> None:
        """Add the share of ``shard``, unless it is in there already, and write the file."""
        if tail_sum is None:
            raise CacheError(f"shard {shard} has no share of the tail prior, which the plan stores")
        if shard in self._num_positions:
            return
        before = sum(self._num_positions.values())
        total_V = self._probability_V.astype(np.float64) * before + tail_sum.sum_V
        self._num_positions[shard] = tail_sum.num_positions
        # Rounded at every step, as a dump that is resumed has it from the file: both end at the same bytes.
        self._probability_V = (total_V / max(before + tail_sum.num_positions, 1)).astype(np.float32)
        self._folder.write(layout.TAIL_PRIOR, pack_prior(self._probability_V, self._num_positions))


def pack_prior(probability_V: NDArray[np.float32], num_positions: dict[int, int]) -> bytes:
    """Return the object that holds a prior and the positions of each shard that it is the mean of."""
    return pack(
        {
            "table/probability": probability_V,
            "table/shards": np.array(list(num_positions), dtype=np.int32),
            "table/num_positions": np.array(list(num_positions.values()), dtype=np.int64),
        }
    )


def read_prior(folder: Folder, manifest: Manifest) -> NDArray[np.float32]:
    """Return the tail prior of a finished cache, [V] float32, checked; raises ``CorruptCacheError``."""
    record = next(item for item in manifest.cache_files if item.path == layout.TAIL_PRIOR)
    num_shards = manifest.num_shards
    probability_V, num_positions = _read(folder, manifest.tokenizer.vocab_size, record)
    if sorted(num_positions) != list(range(num_shards)):
        raise CorruptCacheError(
            f"{folder}, file {layout.TAIL_PRIOR}: it is the mean over shards {_short(sorted(num_positions))}; expected "
            f"all from 0 to {num_shards - 1}"
        )
    wrong = [shard.index for shard in manifest.shards if num_positions[shard.index] != shard.num_positions]
    if wrong:
        raise CorruptCacheError(
            f"{folder}, file {layout.TAIL_PRIOR}: it counts {num_positions[wrong[0]]} positions of shard {wrong[0]}, "
            f"the manifest {manifest.shards[wrong[0]].num_positions}"
        )
    return probability_V


def _short(shards: list[int]) -> str:
    return ", ".join(map(str, shards[:8])) + (", ..." if len(shards) > 8 else "")


def _read(
    folder: Folder, vocab_size: int, record: ObjectRecord | None = None
) -> tuple[NDArray[np.float32], dict[int, int]]:
    """Return the prior and the positions of its shards; the file must be that of ``record``, if there is one."""
    where = f"{folder}, file {layout.TAIL_PRIOR}"
    try:
        data = folder.read(layout.TAIL_PRIOR) if record is None else layout.checked_object(folder, record, str(folder))
    except FileNotFoundError:
        raise CorruptCacheError(f"{where} is missing") from None
    arrays = unpack(data, {path: (record, None) for path, record in _ARRAYS.items()}, where)
    probability_V = arrays["table/probability"]
    if len(probability_V) != vocab_size or not (probability_V >= 0).all() or float(probability_V.sum()) > 1.001:
        raise CorruptCacheError(f"{where}: these are not {vocab_size} probabilities whose sum is at most 1")
    shards, counts = arrays["table/shards"].tolist(), arrays["table/num_positions"].tolist()
    if len(shards) != len(counts) or len(set(shards)) != len(shards):
        raise CorruptCacheError(f"{where}: {len(shards)} shards, but {len(counts)} numbers of positions")
    return probability_V, dict(zip(shards, counts, strict=True))
