"""The command line: one module per command, imported when it runs, so that ``--help`` is instant.

A command reads its options, calls one function of the library and prints the result. A user error (``KdcacheError``)
or a failure of disk or network (``OSError``) prints one message and exits with 1; wrong usage exits with 2; an
interrupt with 130.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys

import click

from kdcache import terminal
from kdcache.errors import KdcacheError, did_you_mean

#: Every command: its module and its one-line help, kept here so that listing them imports nothing.
COMMANDS = {
    "estimate": ("kdcache.cli.estimate", "Compare presets on a pilot: bytes per token, time, information lost."),
    "write-targets": (
        "kdcache.cli.write_targets",
        "Generate target texts for a corpus with an encoder-decoder teacher.",
    ),
    "dump-teacher": ("kdcache.cli.dump_teacher", "Run a teacher over a corpus and store its predictions in a cache."),
    "transcode": (
        "kdcache.cli.transcode",
        "Make a smaller or different cache from a finished one, without the teacher.",
    ),
    "train-student": ("kdcache.cli.train_student", "Train a student from a cache, without the teacher."),
    "sweep": ("kdcache.cli.sweep", "Train many students from one cache and compare them."),
    "evaluate": ("kdcache.cli.evaluate", "Compare students with the teacher on a held-out cache."),
    "inspect": ("kdcache.cli.inspect", "Show the contents of a cache: teacher, corpus, fields, sizes, statistics."),
    "verify": ("kdcache.cli.verify", "Check a cache for damage; optionally run the teacher again."),
    "push": ("kdcache.cli.push", "Copy a cache, or part of it, to an object store."),
    "pull": ("kdcache.cli.pull", "Copy a cache, or part of it, from an object store."),
    "peek": ("kdcache.cli.peek", "Show a sequence of a cache with the teacher's predictions."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"unknown command {args[0]!r}; {did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kdcache")
def cli() -> None:
    """Offline knowledge distillation of language models.

    Run the teacher once over a corpus and store its predictions in a cache. Then train and compare any number of
    students from the cache, without loading the teacher again.

    \b
      kdcache dump-teacher  --teacher MODEL --corpus texts/ --output cache
      kdcache train-student --cache cache --student-size small --output run
      kdcache evaluate      --cache held-out-cache --student run
    """


def main() -> None:
    """Run the command line; the entry point of ``kdcache``."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Else pydantic asks every installed package for plugins, which takes 10 ms at the start of each command.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    with terminal.guarded():
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        _run()


def _run() -> None:
    """Run the command; turn errors of users into a message and an exit code."""
    try:
        cli(prog_name="kdcache", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show(file=sys.stderr)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        terminal.echo("Interrupted. Finished work is kept; run the same command again to resume.", err=True)
        sys.exit(130)
    except KdcacheError as error:
        terminal.echo_error(str(error))
        sys.exit(1)
    except BrokenPipeError:
        # Whatever reads the output (head, less) has closed it: not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # full disk, missing permission, lost network
        path = f"{error.filename}: " if error.filename else ""
        terminal.echo_error(f"{path}{error.strerror or error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
