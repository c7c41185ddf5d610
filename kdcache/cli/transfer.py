"""What ``kdcache push`` and ``kdcache pull`` share: their options, and the words for what was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from kdcache.cli import options

F = TypeVar("F", bound=Callable[..., Any])

NOTES = """
Only what is missing or differs moves; the same command goes on after an interruption. The manifest goes last, so half
a cache is never taken for a whole one. Credentials of S3 come from where its other clients take them (environment,
~/.aws); AWS_ENDPOINT_URL names another server. Needs no torch.
"""


def transfer_options(function: F) -> F:
    """Add the options of a transfer."""
    for option in reversed(
        (
            click.option("--fields", metavar="NAMES", help="Only these fields, such as targets,hidden-3."),
            click.option("--shards", metavar="NUMBERS", help="Only these shards, such as 0-3,7."),
            click.option(
                "--jobs", type=click.IntRange(1, 256), default=8, show_default=True, help="Files that move at once."
            ),
            click.option("--check", is_flag=True, help="Read back what a store holds, also what has the right size."),
            click.option("--dry-run", is_flag=True, help="Print how much would move; write nothing."),
            options.json_option,
            options.quiet_option,
        )
    ):
        function = option(function)
    return function


def run(source: str, target: str, given: dict[str, Any]) -> None:
    """Transfer a cache with the options that were ``given``, and print what that did."""
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
        options.echo_json(result.to_dict())
    else:
        click.echo(_told(result))


def _told(result: Any) -> str:
    what = "a part of it, a cache of its own" if result.is_part else "all of it"
    moved = f"{result.num_files_moved:,} of {result.num_files:,} files"
    size = f"{options.human_bytes(result.num_bytes_moved)} of {options.human_bytes(result.num_bytes)}"
    if result.dry_run:
        return f"Would move {moved} ({size}) to {result.target}: {what}. Nothing was written."
    if not result.num_files_moved:
        return f"{result.target} has all {result.num_files:,} files already ({options.human_bytes(result.num_bytes)})."
    return (
        f"Moved {moved} ({size}) to {result.target}: {what}, {result.num_shards:,} shards, fingerprint "
        f"{result.fingerprint[:16]}, in {options.human_seconds(result.elapsed_s)}."
    )
