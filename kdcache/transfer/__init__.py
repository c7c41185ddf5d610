"""Copy a finished cache, or a part of it, to another directory or object store (``kdcache push``, ``kdcache pull``)."""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.transfer.copy import TransferResult, copy_cache

__all__ = ["TransferResult", "copy_cache", "preview_transfer", "pull_cache", "push_cache"]


def push_cache(
    cache: str,
    url: str,
    *,
    fields: Sequence[str] | None = None,
    shards: Sequence[int] | None = None,
    jobs: int = 8,
    check: bool = False,
    progress: bool = True,
) -> TransferResult:
    """Copy the finished ``cache`` to ``url``, an fsspec URL or another directory; resume an interrupted copy.

    ``fields`` and ``shards`` choose a part, which becomes a cache of its own (default: all). ``jobs`` is the number of
    files that are copied at once. With ``check``, files that are there already are read back and compared by hash.
    Raises ``CacheError`` if ``url`` holds something else or cannot be written, and ``CorruptCacheError`` if the source
    is damaged.
    """
    return copy_cache(cache, url, fields=fields, shards=shards, jobs=jobs, check=check, progress=progress)


def pull_cache(
    url: str,
    directory: str,
    *,
    fields: Sequence[str] | None = None,
    shards: Sequence[int] | None = None,
    jobs: int = 8,
    check: bool = False,
    progress: bool = True,
) -> TransferResult:
    """Copy the finished cache at ``url`` to ``directory``; options and errors are those of `push_cache`."""
    return copy_cache(url, directory, fields=fields, shards=shards, jobs=jobs, check=check, progress=progress)


def preview_transfer(
    source: str,
    target: str,
    *,
    fields: Sequence[str] | None = None,
    shards: Sequence[int] | None = None,
    check: bool = False,
    progress: bool = True,
) -> TransferResult:
    """Return how many files and bytes `push_cache` or `pull_cache` would copy; write nothing."""
    return copy_cache(source, target, fields=fields, shards=shards, check=check, dry_run=True, progress=progress)
