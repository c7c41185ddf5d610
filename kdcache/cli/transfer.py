"""The options and the output of ``kdcache push`` and ``kdcache pull``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from kdcache import terminal
from kdcache.cli import options
from kdcache.words import count

F = TypeVar("F", bound=Callable[..., Any])

NOTES = """
Copies only files that are missing or differ. To resume an interrupted copy, run the same command again. The manifest is
copied last, so an incomplete cache is never taken for a finished one. S3 credentials come from the environment or
~/.aws; AWS_ENDPOINT_URL sets another server. Needs no torch.
"""


def transfer_options(function: F) -> F:
    """Add the options of a transfer."""
    for option in reversed(
        (
            click.option(
                "--fields", metavar="NAMES", help="Copy only these fields, such as targets,hidden-3.  [default: all]"
            ),
            click.option("--shards", metavar="NUMBERS", help="Copy only these shards, such as 0-3,7.  [default: all]"),
            click.option(
                "--jobs",
                type=click.IntRange(1, 256),
                default=8,
                show_default=True,
                help="Copy this many files in parallel.",
            ),
            click.option("--check", is_flag=True, help="Compare existing files by hash, not only by size."),
            click.option("--dry-run", is_flag=True, help="Print how much would be copied; write nothing."),
            options.json_option,
            options.quiet_option,
        )
    ):
        function = option(function)
    return function


def run(source: str, target: str, given: dict[str, Any]) -> None:
    """Copy a cache with the ``given`` options and print the result."""
    from kdcache.transfer import copy_cache
    from kdcache.transfer.part import parse_shards

    fields, shards = given["fields"], given["shards"]
    result = copy_cache(
        source,
        target,
        fields=None if fields is None else [name.strip() for name in fields.split(",")],
        shards=None if shards is None else parse_shards(shards),
        jobs=given["jobs"],
        check=given["check"],
        dry_run=given["dry_run"],
        progress=not given["quiet"],
    )
    if given["as_json"]:
        terminal.echo_json(result.to_dict())
    else:
        terminal.echo(_summary(result))


def _summary(result: Any) -> str:
    what = "a part, as a cache of its own" if result.is_part else "all of it"
    copied = f"{count(result.num_files_moved, 'file', of=result.num_files)}"
    size = f"{options.human_bytes(result.num_bytes_moved)} of {options.human_bytes(result.num_bytes)}"
    if result.dry_run:
        return f"Would copy {copied} ({size}) to {result.target}: {what}. Nothing was written."
    if not result.num_files_moved:
        size = options.human_bytes(result.num_bytes)
        return f"{result.target} has all {count(result.num_files, 'file')} already ({size})."
    return (
        f"Copied {copied} ({size}) to {result.target}: {what}, {count(result.num_shards, 'shard')}, fingerprint "
        f"{result.fingerprint[:16]}, in {options.human_seconds(result.elapsed_s)}."
    )
