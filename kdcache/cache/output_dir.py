"""What a dump may find in its output: nothing, its own beginning, or something that it must not touch."""

from __future__ import annotations

import os
from typing import Any

from kdcache.cache import layout
from kdcache.errors import CacheError
from kdcache.schema import Plan
from kdcache.storage.folder import TEMPORARY, Folder
from kdcache.storage.lease import LEASE

#: Name of the lock file of the one process that writes.
LOCK = ".lock"


def refuse_foreign(folder: Folder) -> None:
    """Raise ``CacheError`` when ``folder`` holds something that is not the beginning of a cache."""
    local = folder.local_path
    if local is not None and local.exists() and not local.is_dir():
        raise CacheError(f"output {local} is a file; give a directory")
    if folder.exists(layout.PLAN):
        return
    ours = {layout.PLAN_TABLE, layout.TOKENIZER, layout.LM_HEAD, LOCK, LEASE}
    if local is not None and local.exists() and not os.path.lexists(local / LOCK):
        ours = set()  # a writer's first file is missing, so a directory "tokenizer" is somebody else's
    foreign = [name for name in folder.names() if name not in ours and not name.endswith(TEMPORARY)]
    if foreign:
        raise CacheError(
            f"output {folder} is not empty and holds no cache (found {foreign[0]}); choose another directory"
        )


def check_same_plan(existing: Plan, wanted: Plan, folder: Folder) -> None:
    """Raise ``CacheError`` saying what differs when ``folder`` holds a cache that is not the ``wanted`` one."""
    lines = differences_of(existing, wanted)
    if lines:
        raise CacheError(
            f"output {folder} holds another cache: {'; '.join(lines[:4])}{' ...' if len(lines) > 4 else ''}. "
            "Repeat the command that began it, or choose another output"
        )


def differences_of(existing: Plan, wanted: Plan) -> list[str]:
    """Return what would make the content of two planned caches differ, one line each."""
    # Names and paths may change while the content, which hashes identify, stays.
    unimportant: Any = {
        "provenance": True,
        "table_sha256": True,  # the bytes of a Parquet file change with the library that writes it
        "teacher": {"name", "revision"},
        "corpus": {"sources"},
    }
    before, after = (p.model_dump(mode="json", exclude=unimportant) for p in (existing, wanted))
    for plan in (before, after):
        for field in plan["fields"]:
            del field["relative_error"]  # of a pilot, which rounds differently on another machine
        plan["fields"] = {field.pop("name"): field for field in plan["fields"]}  # to say which one differs in what
    return [*_differences(before, after), *_other_origin(existing, wanted)]


def _other_origin(existing: Plan, wanted: Plan) -> list[str]:
    """Tell a dump from a transcoding: shards of both would agree in their plans and not in their numbers."""
    there, here = ("a transcoding" if "transcoded" in plan.provenance else "a dump" for plan in (existing, wanted))
    return [] if there == here else [f"it is {there} there and {here} here"]


def _differences(before: Any, after: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line for key in keys for line in _differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if before == after else [f"{path} is {_short(before)} there and {_short(after)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
