"""Errors for users.

::

    KdcacheError                 all errors that kdcache raises on purpose
    ├── ConfigError              an invalid, unknown or contradictory setting
    ├── CorpusError              documents that cannot be found, read or used
    ├── TeacherError             a teacher that cannot be loaded, or has invalid outputs
    ├── StudentError             a student that cannot be loaded, or is incompatible with the cache
    └── CacheError               a cache that is missing, unusable, or lacks what is asked for
        ├── IncompleteCacheError     the dump has not finished
        └── CorruptCacheError        bytes differ from what the manifest describes

A message has three parts: what is wrong, with the value; where; and what to do. The command line prints the message
alone and exits with 1, so a traceback always means a bug in kdcache.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KdcacheError(Exception):
    """Base class of all errors that kdcache raises on purpose."""


class ConfigError(KdcacheError):
    """An invalid, unknown or contradictory setting."""


class CorpusError(KdcacheError):
    """Documents that cannot be found, read or used."""


class TeacherError(KdcacheError):
    """A teacher that cannot be loaded, or has invalid outputs."""


class StudentError(KdcacheError):
    """A student that cannot be loaded, or is incompatible with the cache."""


class CacheError(KdcacheError):
    """A cache that is missing, unusable, or lacks what is asked for."""


class IncompleteCacheError(CacheError):
    """A cache whose dump has not finished."""


class CorruptCacheError(CacheError):
    """Bytes of a cache that differ from what its manifest describes."""


def shortened(text: object, length: int = 80) -> str:
    """Return ``text`` in at most ``length`` characters, for an error: a stranger's text or name may be of any size."""
    whole = str(text)
    return whole if len(whole) <= length else f"{whole[: length - 3]}..."


def first_line(failure: BaseException) -> str:
    """Return the first line of another library's error, and the next one if that ends in a colon.

    The remaining lines are advice for callers of that library.
    """
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [type(failure).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return ``unknown loss 'x'; did you mean 'y'?``, or the list of ``known`` names if none is similar."""
    return f"unknown {kind} {name!r}; {did_you_mean(str(name), known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'y'?`` for the known name most similar to ``name``, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
