from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.synthetic import SyntheticCache

#: A full-featured cache: packed, with hidden states; three shards of 5, 5 and 3 sequences.
SOURCE = SyntheticCache(packed=True, hidden=("hidden-1", "hidden-2"), codec="exact", shard_sequences=5)


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
