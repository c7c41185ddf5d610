"""The errors a user can meet.

::

    KdcacheError                 everything kdcache raises on purpose
    ├── ConfigError              a wrong, unknown or contradictory setting
    ├── CorpusError              documents that cannot be found, read or used
    ├── TeacherError             a teacher that cannot be loaded or answers nonsense
    ├── StudentError             a student that cannot be loaded or does not fit the cache
    └── CacheError               a cache that cannot be used as asked
        ├── IncompleteCacheError     the dump has not finished
        └── CorruptCacheError        bytes are not what the manifest says

Every message says what was expected, what was found, where, and what to do. The command line prints the message
alone and exits with 1; a traceback therefore always means a defect of kdcache.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KdcacheError(Exception):
    """Base of all errors that kdcache raises on purpose."""


class ConfigError(KdcacheError):
    """A wrong, unknown or contradictory setting."""


class CorpusError(KdcacheError):
    """Documents that cannot be found, read or used."""


class TeacherError(KdcacheError):
    """A teacher that cannot be loaded or whose output cannot be used."""


class StudentError(KdcacheError):
    """A student that cannot be loaded or does not fit the cache."""


class CacheError(KdcacheError):
    """A cache that cannot be used as asked."""


class IncompleteCacheError(CacheError):
    """A cache whose dump has not finished."""


class CorruptCacheError(CacheError):
    """Bytes of a cache that are not what its manifest says."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` did you mean 'x'?`` for the known name closest to ``name``, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(names)}"
