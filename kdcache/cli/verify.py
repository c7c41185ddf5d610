"""``kdcache verify``."""

from __future__ import annotations

import sys
from typing import Any

import click

from kdcache import terminal
from kdcache.cli import options
from kdcache.words import count

_EPILOG = """\b
Examples:
  kdcache verify cache
  kdcache verify cache --deep
  kdcache verify cache --against-teacher 20 --teacher ./teacher
"""


@click.command("verify", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.argument("cache")
@click.option("--deep", is_flag=True, help="Also decode every position and check its values.")
@click.option(
    "--against-teacher", type=int, metavar="N", help="Also run the teacher again over N sequences and compare."
)
@click.option(
    "--teacher",
    metavar="ID_OR_PATH",
    help="Teacher model for --against-teacher.  [default: the name in the manifest, if it is a Hugging Face id]",
)
@click.option("--device", default="auto", help="Device of the teacher.", show_default=True)
@options.json_option
@options.quiet_option
def command(
    cache: str,
    deep: bool,
    against_teacher: int | None,
    teacher: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check CACHE for damage: compare the size and SHA-256 of every file with the manifest.

    A problem names the file, the shard and the field. Exits with 1 if there is one. Only --against-teacher needs torch.
    """
    from kdcache.cache import open_cache
    from kdcache.verify.stored import verify_cache

    report = verify_cache(cache, deep=deep, progress=not quiet)
    check = None
    if report.ok and against_teacher is not None:
        from kdcache.teachers import TeacherConfig
        from kdcache.verify.against_teacher import verify_against_teacher

        opened = open_cache(cache)
        record = opened.manifest.teacher
        config = TeacherConfig(
            model=teacher or record.name,
            dtype=record.dtype,
            device=device,
            revision=None if teacher else record.revision,
        )
        check = verify_against_teacher(opened, against_teacher, teacher=config, progress=not quiet)
    if as_json:
        terminal.echo_json(
            {
                "path": report.path,
                "ok": report.ok and (check is None or check.ok),
                "deep": report.deep,
                "num_files": report.num_files,
                "num_shards": report.num_shards,
                "num_sequences": report.num_sequences,
                "num_positions": report.num_positions,
                "num_objects": report.num_objects,
                "num_bytes": report.num_bytes,
                "problems": report.problems,
                "teacher": check.to_dict() if check else None,
            }
        )
    else:
        _echo(report, check)
    if not report.ok or (check is not None and not check.ok):
        sys.exit(1)


def _advice(report: Any) -> str:
    """Return how to repair the problems: shards need the teacher again, other files do not."""
    advice = []
    if report.num_rewritable:
        advice.append("To repair plan.parquet, tokenizer files and LM head, run the command that made the cache again.")
    if len(report.problems) > report.num_rewritable + len(report.unlisted):
        advice.append(
            "To repair a shard, copy its files again; or delete its commit record and the manifest, and run the same "
            "dump-teacher command again."
        )
    return " ".join(advice)


def _echo(report: Any, check: Any) -> None:
    for problem in report.problems:
        terminal.echo(terminal.one_line(f"PROBLEM {problem}"))
    if report.problems:
        terminal.echo(f"{count(len(report.problems), 'problem')} in {report.path}. {_advice(report)}")
        return
    kind = "bytes and content are" if report.deep else "every byte is"
    held = f"{count(report.num_sequences, 'sequence')} and {count(report.num_positions, 'position')}"
    decoded = f"; decoded and checked {held}" if report.deep else f", with {held}"
    terminal.echo(
        f"{report.path}: {kind} as written. Checked {count(report.num_files, 'file')} "
        f"({count(report.num_shards, 'shard')} of {options.human_bytes(report.num_bytes)}, tokenizer, plan and "
        f"records){decoded}."
    )
    if check is None:
        return
    weights = "same weights" if check.same_weights else "OTHER WEIGHTS than the cache records"
    parts = [weights]
    if check.same_head is False:
        parts.append("ANOTHER LM HEAD than the teacher's")
    if check.mean_kl is not None:
        parts.append(f"mean KL to the cache {check.mean_kl:.2e} nats (allowed {check.allowed_kl:.0e})")
    if check.mean_gold_difference is not None:
        parts.append(
            f"gold log-probability off by {check.mean_gold_difference:.2e} on average (allowed "
            f"{check.allowed_gold_difference:.0e})"
        )
    if check.outputs_error is not None:
        parts.append(
            f"raw outputs off by {check.outputs_error:.2e} of their size (allowed {check.allowed_outputs_error:.0e})"
        )
    if check.top1_agreement is not None:
        parts.append(f"top-1 agreement {check.top1_agreement:.4f}")
    where = f"{count(check.num_sequences, 'sequence')} ({count(check.num_positions, 'position')})"
    terminal.echo(f"Teacher over {where}: {', '.join(parts)}.")
    if check.samples_excess is not None:
        terminal.echo(
            f"Samples: mean surprise off by {check.samples_excess:.2e} nats (allowed "
            f"{check.allowed_samples_excess:.0e})."
        )
    if check.states_error is not None:
        terminal.echo(
            f"Last hidden states: relative difference {check.states_error:.2e} (allowed "
            f"{check.allowed_states_error:.0e})."
        )
