"""``kdcache train-student``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from kdcache import terminal
from kdcache.cli import options
from kdcache.words import count

if TYPE_CHECKING:
    from kdcache.train.memory import MemoryReport
    from kdcache.train.report import TermReport, TrainingReport
    from kdcache.train.sample import SampleReport

_EPILOG = """\b
Examples:
  kdcache train-student --cache cache --student-size small --output run --dry-run
  kdcache train-student --cache cache --student HuggingFaceTB/SmolLM2-135M --output run
  kdcache train-student --config train.yaml --set objective.forward_kl.temperature=2
  kdcache train-student --config train.yaml --set objective.cross_entropy.weight=1      (no distillation)
  kdcache train-student --config train.yaml --where "teacher_loss < 5 and num_positions >= 32"
  kdcache train-student --config train.yaml --curriculum teacher_loss --set curriculum.pacing=linear
  torchrun --nproc-per-node 2 -m kdcache train-student --config train.yaml              (two GPUs, or on a CPU)
  accelerate launch --multi_gpu --num_processes 2 -m kdcache train-student --config train.yaml

\b
Setting any loss weight disables every loss that you do not list. The default is 0.9 forward_kl + 0.1 cross_entropy.
"""


@click.command("train-student", context_settings=options.CONTEXT, epilog=_EPILOG)
@click.option("--cache", metavar="CACHE", help="Cache to train on, finished: directory or URL.")
@click.option(
    "--student", metavar="ID_OR_PATH", help="Start from a pretrained model: Hugging Face id or local directory."
)
@click.option(
    "--student-config", metavar="FILE", help="Start from random weights: a Hugging Face config.json, or YAML."
)
@click.option(
    "--student-size", metavar="SIZE", help="Start from random weights: nano, tiny, small, base, medium or large."
)
@click.option("--output", metavar="RUN", help="Directory for checkpoints and the trained student.")
@click.option("--max-steps", type=int, help="Train for this many optimiser steps, instead of --epochs.")
@click.option("--epochs", type=float, help="Train for this many passes over the cache.  [default: 1]")
@click.option("--where", metavar="FILTER", help="Train only on sequences that match, such as teacher_loss < 5.")
@click.option("--curriculum", metavar="COLUMN", help="Train on easy sequences first, by a column such as teacher_loss.")
@click.option("--batch-sequences", type=int, help="Sequences per device and micro-batch.  [default: 8]")
@click.option("--gradient-accumulation", type=int, help="Micro-batches per optimiser step.  [default: 1]")
@click.option("--learning-rate", type=float, help="Peak learning rate.  [default: 1e-3 from random weights, else 3e-4]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    help="Compute in fp32, or in bf16 with autocast.  [default: fp32]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Device; auto takes a GPU if there is one.  [default: auto]",
)
@click.option(
    "--local-store", metavar="DIR", help="Keep shards of a remote cache in this directory.  [default: ~/.cache/kdcache]"
)
@click.option(
    "--local-store-bytes", metavar="SIZE", help="Keep at most this much there, such as 20GB.  [default: 50GB]"
)
@click.option("--seed", type=int, help="Seed of data order and dropout.  [default: 0]")
@options.config_options
@click.option("--resume", is_flag=True, hidden=True, help="Accepted: a run in --output is always resumed.")
@click.option("--dry-run", is_flag=True, help="Print initial losses, memory, time and warnings; write nothing.")
@options.json_option
@options.quiet_option
def command(
    config_file: str | None,
    assignments: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Train a student from a cache, without the teacher.

    Teacher, tokenizer, top-k and codec come from the cache and are not configured. The result in --output is a plain
    Hugging Face model with its tokenizer: AutoModelForCausalLM.from_pretrained(RUN) needs no kdcache.

    To resume an interrupted run, run the same command again: it goes on from the newest checkpoint. An --output that
    holds a run of other settings is refused.
    """
    from kdcache.config import load
    from kdcache.train import TrainConfig

    config = load(TrainConfig, file=config_file, assignments=assignments, options=_settings(given))
    # After the configuration was read: what these import takes seconds.
    from kdcache.train import leave_processes, preview_training, train_student

    is_first = int(os.environ.get("RANK", "0")) == 0  # of several processes only the first prints
    if dry_run:
        report = preview_training(config)
        if not is_first:
            return
        if as_json:
            terminal.echo_json(report.to_dict())
        else:
            _echo_report(report)
        return
    result = train_student(config, progress=not quiet)
    leave_processes()
    if not is_first:
        return
    if as_json:
        terminal.echo_json(dataclasses.asdict(result))
        return
    losses = ", ".join(f"{name} {value:.4f}" for name, value in result.losses.items())
    terminal.echo(
        f"Trained {count(result.steps, 'step')} in {options.human_seconds(result.seconds)} ({result.tokens_per_s:,.0f} "
        f"tokens/s, {result.data_wait:.1%} of the time waiting for data); last losses: {losses}. The student is in "
        f"{result.output}."
    )


#: First parts of options whose settings have other names.
_NESTED = ("student", "curriculum", "local_store")


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the given options; those that an option excludes are None, which overrides a file."""
    settings = options.settings_tree(
        {
            "student.model": given["student"],
            "student.config_file": given["student_config"],
            "student.size": given["student_size"],
            "curriculum.by": given["curriculum"],
            "local_store.directory": given["local_store"],
            "local_store.max_bytes": given["local_store_bytes"],
            # The other options have the names of their settings.
            **{name: value for name, value in given.items() if not name.startswith(_NESTED)},
        }
    )
    if "student" in settings:
        # The revision in the file belongs to the student in the file.
        settings["student"] = dict.fromkeys(("model", "config_file", "size", "revision")) | settings["student"]
    if "epochs" in settings or "max_steps" in settings:
        settings = dict.fromkeys(("epochs", "max_steps")) | settings
    return settings


def _echo_report(report: TrainingReport) -> None:
    """Print a dry run: sizes, memory, loss terms and warnings."""
    from kdcache.table import render_table

    sample, memory, speed = report.sample, report.memory, report.speed
    assert speed is not None
    of = "" if memory.available_bytes is None else f" of {options.human_bytes(memory.available_bytes)}"
    terminal.echo_rows(
        [
            ("student", f"{report.student}, {count(report.num_parameters, 'parameter')}"),
            (
                "to train",
                f"{count(report.num_trainable_parameters, 'parameter')}, learning rate {report.learning_rate:g}",
            ),
            ("teacher", report.teacher),
            ("texts", f"{count(report.num_sequences, 'sequence')}, {count(report.num_positions, 'position')}"),
            (
                "a step",
                f"{count(report.sequences_per_step, 'sequence')}, about {count(report.tokens_per_step, 'position')}",
            ),
            ("steps", f"{report.steps:,} ({report.steps_per_epoch:,} an epoch, {count(report.epochs, 'epoch')})"),
            *options.known_row("teacher loss", report.teacher_loss, ".4f"),
            *options.known_row("kept mass", report.kept_mass, ".4f", " at temperature 1"),
            *_sample_row(sample),
            ("memory", f"about {options.human_bytes(memory.total_bytes)}{of} ({memory.device})"),
            ("of which", _parts(memory)),
            ("besides", f"{options.human_bytes(memory.process_bytes)} of Python and its libraries, in memory already"),
            ("speed", f"about {speed.tokens_per_s:,.0f} tokens/s; the loss takes {speed.loss_share:.0%} of the time"),
            ("time", f"about {options.human_seconds(speed.eta_s)}, {speed.step_s:.3g} s a step"),
            ("output", f"{report.output} (nothing was written)"),
        ]
    )
    terminal.echo("\n" + render_table(_TERM_COLUMNS, [_TermRow(term) for term in report.terms]))
    for warning in report.warnings:
        terminal.echo(f"\nwarning: {warning}")


def _sample_row(sample: SampleReport) -> list[tuple[str, str]]:
    if sample.student_loss is None or sample.teacher_loss is None:
        return []
    losses = f"student {sample.student_loss:.4f} before the first step, teacher {sample.teacher_loss:.4f}"
    return [("on a sample", f"{losses} ({count(sample.num_positions, 'position')})")]


_TERM_COLUMNS = {
    "name": ("term", "s"),
    "weight": ("weight", "s"),
    "temperature": ("temperature", "s"),
    "mode": ("mode", "s"),
    "tail": ("tail", "s"),
    "kept_mass": ("kept mass", ".4f"),
    "selected": ("selected", ".4f"),
    "value": ("value now", ".4f"),
    "ms_per_1000_positions": ("adds ms/1,000 positions", ".1f"),
    "needs": ("needs of the teacher", "s"),
}


class _TermRow:
    """A loss term for the table: weight and temperature with their schedules."""

    def __init__(self, term: TermReport) -> None:
        from kdcache.train.report import start_to_end

        self.__dict__.update(dict(term))
        self.weight = start_to_end(term.weight, term.weight_end)
        self.temperature = start_to_end(term.temperature, term.temperature_end)


def _parts(memory: MemoryReport) -> str:
    parts = {name.removesuffix("_bytes"): value for name, value in memory if name.endswith("_bytes")}
    return ", ".join(
        f"{name} {options.human_bytes(parts[name])}" for name in parts if name not in ("available", "process")
    )
