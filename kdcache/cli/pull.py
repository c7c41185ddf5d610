"""``kdcache pull``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cli import options, transfer

_EPILOG = f"""\b
Examples:
  kdcache pull s3://bucket/caches/small cache
  kdcache pull s3://bucket/caches/small sample --shards 0-3
  kdcache pull s3://bucket/caches/small cache --fields targets,hidden-12
{transfer.NOTES}"""


@click.command("pull", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.argument("url", metavar="URL")
@click.argument("directory", metavar="DIR")
@transfer.transfer_options
def command(url: str, directory: str, **given: Any) -> None:
    """Copy the finished cache at URL, or a part of it, to the directory DIR.

    Every file is checked against its hash. A part is a cache of its own with shards numbered from 0. It always has the
    field targets, and the last hidden state if the cache is of the kind hidden. Training can also read a URL directly;
    pull a cache that you train from often.
    """
    transfer.run(url, directory, given)
