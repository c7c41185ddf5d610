"""How much memory one object of a cache may take when it is decoded.

A few kilobytes can say that they decode to terabytes: zeros compress without end, and a manifest may count rows as it
likes. So sizes are computed from shapes and headers, and compared with one limit, before anything is allocated.
"""

from __future__ import annotations

import os

from kdcache.errors import CacheError, ConfigError
from kdcache.storage.local_store import parse_bytes

#: Bytes that the arrays of one object (a field of a shard, or a table) may take in memory, unless told otherwise.
DEFAULT_BYTES = 8 << 30
#: Sets the limit for commands; a number of bytes, or a size such as ``20GB``.
VARIABLE = "KDCACHE_MAX_DECODED_BYTES"


def decoded_limit(given: int | str | None = None) -> int:
    """Return the limit in bytes: ``given``, else that of the environment, else `DEFAULT_BYTES`.

    Raises ``ConfigError`` for anything but a size above 0.
    """
    name, value = "max_decoded_bytes", given
    if value is None:
        name, value = VARIABLE, os.environ.get(VARIABLE) or DEFAULT_BYTES
    try:
        most = int(parse_bytes(int(value) if isinstance(value, str) and value.strip().isdecimal() else value))
    except (ValueError, TypeError):
        most = 0
    if most < 1:
        raise ConfigError(f"{name} is {value!r}, expected a number of bytes above 0, or a size such as 20GB")
    return most


def check_decoded(num_bytes: int, most: int, where: str) -> None:
    """Raise ``CacheError`` where an object would take more than ``most`` bytes in memory."""
    if num_bytes > most:
        raise CacheError(
            f"{where} takes {num_bytes:,} bytes in memory, more than the limit of {most:,}. If the cache is really so "
            f"large, raise the limit: max_decoded_bytes of open_cache, or the environment variable {VARIABLE}, such as "
            f"{VARIABLE}=64GB; shards of fewer positions need less"
        )
