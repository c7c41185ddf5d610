"""Names of a record that become paths: what they may be. Records come from strangers, so they are checked when read.

A name is one part of a path; a path is names joined by ``/``, relative to the cache. Only letters, digits, ``.``,
``_`` and ``-`` are allowed, because they mean the same on every file system, in URLs and in the keys of object stores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

from kdcache.errors import shortened

#: Longest name; with number, attempt and ending a file name then stays below the 255 bytes of common file systems.
MAX_NAME = 100
#: Longest part of a path.
MAX_PART = 255
#: Longest path.
MAX_PATH = 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: Files of a cache that are no objects: records of the layout, and what belongs to a writer.
_RESERVED = frozenset({"manifest.json", "plan.json", "plan.parquet", "writer.json", "commits"})
_TEMPORARY = ".tmp"


def is_name(text: str, longest: int = MAX_NAME) -> bool:
    """Return whether ``text`` may be one part of a path."""
    return len(text) <= longest and _NAME.fullmatch(text) is not None


def check_name(text: str) -> str:
    """Return ``text``, the name of a field, attempt, array or axis; raise ``ValueError`` where it is no name."""
    if not is_name(text):
        raise ValueError(
            f"{shortened(text)!r} is no name: expected at most {MAX_NAME} letters, digits, '.', '_' and '-', beginning "
            "with a letter or a digit"
        )
    return text


def check_object_path(text: str) -> str:
    """Return ``text``, the path of a file of a cache; raise ``ValueError`` where it is not made of names."""
    parts = text.split("/")
    if len(text) > MAX_PATH or not all(is_name(part, MAX_PART) for part in parts):
        raise ValueError(
            f"path {shortened(text)!r} leads outside the cache or is no path of names: expected letters, digits, '.', "
            "'_' and '-' between slashes"
        )
    return text


def check_not_reserved(path: str) -> None:
    """Raise ``ValueError`` where ``path`` is that of a record of the layout or of a writer, not of an object."""
    if path.split("/")[0].lower() in _RESERVED or path.lower().endswith(_TEMPORARY):
        raise ValueError(f"path {shortened(path)!r} belongs to a record of the cache, not to an object")


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs again, None where all differ; capitals count as small letters.

    Some file systems do not tell capitals from small letters, so two such files would be one.
    """
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            return name
        seen.add(name.lower())
    return None


#: The name of a field, an attempt, an array or an axis.
Name = Annotated[str, AfterValidator(check_name)]
#: The path of an object, relative to the cache.
ObjectPath = Annotated[str, AfterValidator(check_object_path)]
