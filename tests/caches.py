"""Fixtures of caches that tests of several folders read, copy and damage; registered in ``tests/conftest.py``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcache.schema import TargetsRecord
from tests.synthetic import SyntheticCache

#: A full-featured cache: packed, with hidden states; three shards of 5, 5 and 3 sequences.
SOURCE = SyntheticCache(packed=True, hidden=("hidden-1", "hidden-2"), codec="exact", shard_sequences=5)


#: One cache of every kind of targets, each of four shards (4, 4, 4 and 1 sequences).
RECORDS = {
    "min_prob": TargetsRecord(top_k=9, min_prob=0.02),
    "min_mass": TargetsRecord(top_k=9, min_mass=0.8),
    "temperatures": TargetsRecord(top_k=4, temperatures=(0.5, 2.0)),
    "tail prior": TargetsRecord(top_k=4, tail_prior=True),
    "all of top-k": TargetsRecord(top_k=9, min_prob=0.02, temperatures=(2.0,), tail_prior=True),
    "sampled": TargetsRecord(kind="sampled", top_k=0, num_samples=12),
    "sampled, 300 samples": TargetsRecord(kind="sampled", top_k=0, num_samples=300),
    "hybrid": TargetsRecord(kind="hybrid", top_k=2, num_samples=7),
    "hidden": TargetsRecord(kind="hidden", top_k=1),
}
KINDS = {kind: SyntheticCache(record=record) for kind, record in RECORDS.items()}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write the cache of a kind, once."""
    root = tmp_path_factory.mktemp("kinds")

    def write(kind: str) -> Path:
        if not (root / kind).exists():
            KINDS[kind].write(root / kind)
        return root / kind

    return write


@pytest.fixture
def copy_of(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy the cache of a kind, to be damaged."""
    return lambda kind: Path(shutil.copytree(written(kind), tmp_path / "copy"))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "cache"
    SOURCE.write(path)
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


@pytest.fixture
def forbid_large_arrays() -> Iterator[Callable[[int], None]]:
    """Limit what the process may allocate beyond what it has now."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)

    def limit(num_bytes: int) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_AS, before)
