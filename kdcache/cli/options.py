"""Options shared by several commands, settings made from options, and output formats."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def config_options(function: F) -> F:
    """Add ``--config`` and ``--set``."""
    function = click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY.SUB=VALUE",
        help="Change any setting; VALUE is read as YAML. Overrides options and --config. Repeatable.",
    )(function)
    return click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False),
        help="YAML file with settings. Options override the file.",
    )(function)


def quiet_option(function: F) -> F:
    """Add ``--quiet``."""
    return click.option("-q", "--quiet", is_flag=True, callback=_silence, help="Hide progress bars.")(function)


def _silence(ctx: click.Context, parameter: click.Parameter, quiet: bool) -> bool:
    # For bars of other libraries (the GGUF loader). tqdm reads this variable when it is first imported, and no module
    # that is loaded before a command runs imports tqdm.
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    return quiet


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON to standard output.")(
        function
    )


def settings_tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"teacher.model": "x", "output": None}`` into ``{"teacher": {"model": "x"}}``, without None and ()."""
    from kdcache.config import merge, nest

    tree: dict[str, Any] = {}
    for path, value in values.items():
        if value is not None and value != ():
            tree = merge(tree, nest(path, list(value) if isinstance(value, tuple) else value))
    return tree


def known_row(name: str, value: float | None, form: str, unit: str = "") -> list[tuple[str, str]]:
    """Return a line for `kdcache.terminal.echo_rows` with a number in a format; none where it is not known."""
    return [] if value is None else [(name, f"{value:{form}}{unit}")]


def human_bytes(count: float) -> str:
    """Return a count of bytes for people: ``12.3 MB`` (powers of 1,000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """Return a duration for people: ``42 s``, ``3 min 20 s``, ``5 h 12 min``."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
