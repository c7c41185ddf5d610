"""``kdcache push``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cli import options, transfer

_EPILOG = f"""\b
Examples:
  kdcache push cache s3://bucket/caches/small
  kdcache push cache s3://bucket/caches/targets-only --fields targets
  kdcache push cache s3://bucket/caches/small --dry-run
{transfer.NOTES}"""


@click.command("push", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.argument("cache", metavar="CACHE")
@click.argument("url", metavar="URL")
@transfer.transfer_options
def command(cache: str, url: str, **given: Any) -> None:
    """Copy the finished CACHE, or a part of it, to an object store (any fsspec URL) or another directory.

    A part is a cache of its own with shards numbered from 0. It always has the field targets, and the last hidden state
    if CACHE is of the kind hidden.
    """
    transfer.run(cache, url, given)
