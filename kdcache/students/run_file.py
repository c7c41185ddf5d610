"""Read ``kdcache_run.json``, which says how a student was trained; `kdcache.train.run_record` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN_FILE = "kdcache_run.json"
#: Members that are mappings.
_MAPPINGS = ("cache", "student", "settings", "config")


def read_run(directory: str | Path) -> dict[str, Any] | None:
    """Return the record of the run that made ``directory``, None if there is none that can be read."""
    try:
        record = json.loads((Path(directory) / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(name, {}), dict) for name in _MAPPINGS):
        return None  # a student may come from a stranger
    return record
