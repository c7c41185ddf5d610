from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.config import build, merge
from kdcache.sweep import SweepConfig

Make = Callable[..., SweepConfig]


@pytest.fixture
def make(dumped: Path, tmp_path: Path) -> Make:
    """Return a sweep of nano students over the shared cache, with changes."""

    def make_config(**changes: Any) -> SweepConfig:
        base = {
            "cache": str(dumped),
            "student": {"size": "nano"},
            "max_steps": 3,
            "device": "cpu",
            "logging_steps": 1,
            "save_steps": 1,
        }
        return build(SweepConfig, merge({"output": str(tmp_path / "runs"), "base": base}, changes))

    return make_config
