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

    Every file is compared with its hash before it gets its name. A part is a cache of its own, whose shards count from
    0. It always has the field targets, and in a cache of the kind hidden the last state. Training reads a URL without
    this; pull what is trained from often.
    """
    transfer.run(url, directory, given)
