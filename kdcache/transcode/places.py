"""Where a transcoding may write: not into its source, and only over the beginning of the very same transcoding."""

from __future__ import annotations

from typing import Any

from kdcache.cache import layout
from kdcache.cache.output_dir import check_same_plan, differences_of
from kdcache.errors import CacheError
from kdcache.schema import Plan
from kdcache.storage.folder import Folder
from kdcache.transcode.plan import origin_of


def refuse_another_origin(folder: Folder, plan: Plan) -> None:
    """Refuse an output that was begun from another source or with other sequences, which plans alone do not tell."""
    existing = layout.read_plan(folder)
    if existing is None or differences_of(existing, plan) or origin_of(existing) == origin_of(plan):
        return
    if layout.num_commits(folder, existing):
        raise CacheError(
            f"output {folder} was begun from another source or with another filter: {_told(origin_of(existing))} "
            f"there and {_told(origin_of(plan))} here. Repeat the command that began it, or choose another output"
        )
    folder.write(layout.PLAN, layout.to_json(plan))  # nothing is made of it yet


def _told(origin: tuple[Any, ...] | None) -> str:
    if origin is None:
        return "a dump"
    return f"source {str(origin[0])[:16]}, where {origin[1]!r}, limit {origin[2]!r}"


def num_committed(folder: Folder, plan: Plan) -> int:
    """Return how many shards of the planned output exist; raises ``CacheError`` when it holds another cache."""
    existing = layout.read_plan(folder)
    if existing is None:
        return 0
    count = layout.num_commits(folder, existing)
    if count:
        check_same_plan(existing, plan, folder)
        refuse_another_origin(folder, plan)
    return count
