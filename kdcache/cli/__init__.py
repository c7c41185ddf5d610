"""The command line: one module per command, imported when it runs, so that ``--help`` is instant.

A command reads its options, calls one function of the library and prints the result. A user error (``KdcacheError``)
or a failure of disk or network (``OSError``) prints one message and exits with 1; wrong usage exits with 2. A signal
that ends a command (Ctrl-C, SIGTERM, SIGHUP) exits with 128 and its number, after the command has cleaned up; so does
the end of whatever reads the output, silently, as for other tools.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click

from kdcache import terminal
from kdcache.errors import KdcacheError, did_you_mean, shortened

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
#: Commands that resume when they are run again.
RESUMABLE = ("write-targets", "dump-teacher", "transcode", "train-student", "sweep", "push", "pull")


class _Terminated(KeyboardInterrupt):
    """A signal that ends the command in the same way as Ctrl-C; its argument is the number."""


class _Stopped(Exception):
    """What ended ``command`` early: an ``OSError`` or an interrupt, as the cause.

    click has its own way with these: it exits with 1 after any broken pipe, also one to a server, without a word.
    """

    def __init__(self, command: str | None) -> None:
        self.command = command


class LazyGroup(click.Group):
    """A group that imports a command when it is used."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, KeyboardInterrupt) as error:
            raise _Stopped(ctx.invoked_subcommand) from error

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
    with terminal.guarded(), _ended_by_signals():
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        try:
            sys.exit(_run())
        except terminal.OutputClosedError:  # what read the output (head, less) has ended
            sys.exit(128 + _SIGPIPE)


#: Signals that ask a process to end; without a handler they would end it at once, and temporary files would stay.
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SIGPIPE = 13


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise `_Terminated` in the main thread for signals that would end the process."""

    def end(number: int, frame: object) -> None:
        raise _Terminated(number)

    changed = []
    # One that is ignored (nohup) or that a program has its own use for stays as it is.
    with contextlib.suppress(ValueError):  # not the main thread
        for number in _ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, end)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _run() -> int:
    """Run the command; turn errors of users and interrupts into a message, and return the exit code."""
    try:
        cli(prog_name="kdcache", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as stop:  # before the command began
        return _interrupted(stop.__cause__ or stop, None)
    except KdcacheError as error:
        terminal.echo_error(str(error))
        return 1
    except _Stopped as stop:
        if not isinstance(stop.__cause__, OSError):
            return _interrupted(stop.__cause__, stop.command)
        return _failed(stop.__cause__)
    except OSError as failure:  # before the command began, such as while its help was written
        return _failed(failure)
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of a library in Rust; no Exception
            terminal.echo_error(f"a library failed on this input, a tokenizer most likely: {shortened(error, 200)}")
            return 1
        if not _is_out_of_memory(error):
            raise
        words = shortened(" ".join(str(error).split()) or "no memory left", 200)
        terminal.echo_error(
            f"out of memory ({words}); use smaller batches (batch_tokens, or batch_sequences with more "
            "gradient_accumulation), a smaller model or another device"
        )
        return 1
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    # torch has a class of its own for GPUs, a RuntimeError for the CPU and for other libraries of a GPU.
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "can't start new thread")
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in words)
    return isinstance(error, MemoryError)


#: What to do about errors of the system that a user can change.
_ADVICE = {
    errno.EMFILE: "; raise the limit (ulimit -n), or use fewer --jobs or data_threads",
    errno.ENOSPC: "; free some space, and run the same command again",
    errno.EDQUOT: "; free some of your quota, and run the same command again",
}


def _failed(failure: OSError) -> int:
    """Print a full disk, a missing permission or a lost network."""
    path = f"{failure.filename}: " if failure.filename else ""
    terminal.echo_error(f"{path}{failure.strerror or failure}{_ADVICE.get(failure.errno or 0, '')}")
    return 1


def _interrupted(cause: BaseException | None, command: str | None) -> int:
    number = cause.args[0] if isinstance(cause, _Terminated) else signal.SIGINT
    advice = " Finished work is kept; run the same command again to resume." if command in RESUMABLE else ""
    with contextlib.suppress(OSError, terminal.OutputClosedError):  # after SIGHUP there is no terminal any more
        terminal.echo(f"Interrupted.{advice}", err=True)
    return 128 + int(number)


if __name__ == "__main__":
    main()
