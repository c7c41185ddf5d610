"""Write docs/cli.md from the help of every command: ``python docs/generate_cli.py``.

The page is what ``--help`` prints, so that it cannot say anything else; a test makes it anew and compares. Width and
program name are fixed here, because click takes them from the terminal otherwise.
"""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import COMMANDS, cli

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100

_INTRODUCTION = """\
# Command line

Generated from `--help` by `python docs/generate_cli.py`; do not edit it by hand.

Settings come from a YAML file (`--config`), from options, which win over the file, and from `--set KEY.SUB=VALUE`,
which wins over both. A command exits with 0 when it did its work, 1 after a mistake that it explains in one message
(and when `verify` finds something wrong), 2 when it was called wrongly, and 128 plus the number of the signal that
ended it: 130 after Ctrl-C, 143 after SIGTERM, 141 when whatever reads its output has ended.
`python -m kdcache` is the same as `kdcache`.
"""


def render() -> str:
    """Return the whole page."""
    parent = _context(cli, "kdcache")
    parts = [_INTRODUCTION, _section("kdcache", cli, parent)]
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        assert command is not None, f"{name} is listed in COMMANDS but has no command"
        parts.append(_section(f"kdcache {name}", command, _context(command, name, parent)))
    return "\n".join(parts)


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return command.make_context(
        name, [], parent=parent, resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )


def _section(title: str, command: click.Command, context: click.Context) -> str:
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {title}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
