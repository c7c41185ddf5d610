"""What is known of a training run before its first step: records, their text, and warnings.

A run that cannot succeed looks like any other for hours: a teacher that is no better than the student, kept ids with
half of the teacher's mass, a micro-batch that does not fit. All of that can be seen beforehand (`kdcache.train.preview`
measures it). Certain mistakes raise errors elsewhere; a warning here may be intended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kdcache.config import Config
from kdcache.json_files import finite
from kdcache.train.memory import MemoryReport
from kdcache.train.sample import SampleReport
from kdcache.train.timing import SpeedReport
from kdcache.words import count

#: Kept mass below which there is a warning: where the tail is discarded, and where its mass at least is learnt.
LOW_MASS_WITHOUT_TAIL = 0.7
LOW_MASS_WITH_TAIL = 0.5
#: Guessing has loss log V; a student that is this many nats worse is confidently wrong.
_WORSE_THAN_GUESSING = 1.0

_GIB = 1 << 30


class TermReport(Config):
    """One term of the objective: its settings for this cache, and its value before the first step.

    ``weight`` and ``temperature`` are those of the first step, with ``_end`` of the last (schedules change them);
    ``is_trained`` is whether the weight is above 0 at any time. ``kept_mass`` is the teacher's mass on the ids that the
    term compares one by one, at its temperature, the lowest of the run; None with samples or without a teacher.
    ``selected`` is the share of the sample's positions that the term selects (None: all); ``value`` the unweighted mean
    per position on the sample; ``ms_per_1000_positions`` the time that the term adds to the others, if measured.
    """

    name: str
    weight: float
    weight_end: float
    temperature: float | None
    temperature_end: float | None
    mode: str | None
    tail: str | None
    needs: str
    uses_teacher: bool
    is_trained: bool
    kept_mass: float | None
    selected: float | None = None
    value: float
    ms_per_1000_positions: float | None


class TrainingReport(Config):
    """What a training run will do. Losses in nats per position, sizes in bytes, times in seconds.

    ``teacher_loss`` and ``kept_mass`` (at temperature 1) are those of all positions trained on, from the cache's
    statistics; ``sample`` compares student and teacher on the first positions of the training order. ``speed`` is None
    where nothing was timed. The fields and their names are stable.
    """

    student: str
    num_parameters: int
    num_trainable_parameters: int
    teacher: str
    num_sequences: int
    num_positions: int
    sequences_per_step: int
    tokens_per_step: int
    """Positions of a step; ``unit`` says what a position is."""
    unit: str = "token"
    steps_per_epoch: int
    steps: int
    epochs: float
    learning_rate: float
    objective: dict[str, Any]
    output: str
    vocab_size: int
    teacher_loss: float | None
    kept_mass: float | None
    sample: SampleReport
    terms: tuple[TermReport, ...]
    memory: MemoryReport
    speed: SpeedReport | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is likely to be wrong with the run, and what to do about it."""
        return (*_about_losses(self), *_about_kept_mass(self), *_about_selection(self), *_about_memory(self.memory))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, warnings included, as plain JSON types; None for a number that is not finite."""
        memory = {"total_bytes": self.memory.total_bytes, "fits": self.memory.fits}
        data = self.model_dump(mode="python")
        plain: dict[str, Any] = finite({**data, "memory": data["memory"] | memory, "warnings": list(self.warnings)})
        return plain

    def summary(self) -> list[str]:
        """Return the lines that a run prints before its first step, warnings last."""
        sample, memory = self.sample, self.memory
        of = "" if memory.available_bytes is None else f" of {memory.available_bytes / _GIB:.2f}"
        return [
            f"teacher {self.teacher}"
            + ("" if self.teacher_loss is None else f": loss {self.teacher_loss:.4f}")
            + ("" if self.kept_mass is None else f", kept mass {self.kept_mass:.4f}"),
            f"student {self.student}, {count(self.num_trainable_parameters, 'parameter')} to train"
            + losses_text(sample),
            "objective: " + "; ".join(f"{term_text(term)}, now {term.value:.4f}" for term in self.terms),
            f"{count(self.steps, 'step')} of about {self.tokens_per_step:,} {self.unit}s; memory about "
            f"{memory.total_bytes / _GIB:.2f}{of} GiB ({memory.device}), besides {memory.process_bytes / _GIB:.2f} GiB "
            "of Python and its libraries",
            *(f"warning: {warning}" for warning in self.warnings),
        ]


def losses_text(sample: SampleReport) -> str:
    """Return the losses of student and teacher in words; empty where there are none."""
    if sample.student_loss is None:
        return ""
    if sample.teacher_loss is None:
        return f": loss {sample.student_loss:.4f} at the start on {count(sample.num_positions, 'position')}"
    return (
        f": loss {sample.student_loss:.4f} at the start, the teacher's {sample.teacher_loss:.4f} on the same "
        f"{count(sample.num_positions, 'position')}"
    )


def term_text(term: TermReport) -> str:
    """Return a term's settings in words: ``0.9 forward_kl (temperature 2, mode decoupled, tail bucket)``."""
    settings = {
        "temperature": start_to_end(term.temperature, term.temperature_end),
        "mode": term.mode,
        "tail": term.tail,
    }
    given = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    return f"{start_to_end(term.weight, term.weight_end)} {term.name}" + (f" ({given})" if given else "")


def start_to_end(start: float | None, end: float | None) -> str | None:
    """Return ``2``, or ``2 -> 1`` where a value changes during the run; None for None."""
    if start is None or end is None:
        return None
    return f"{start:g}" if start == end else f"{start:g} -> {end:g}"


def _about_losses(report: TrainingReport) -> Iterator[str]:
    student, teacher, guessing = report.sample.student_loss, report.sample.teacher_loss, math.log(report.vocab_size)
    distils = any(term.uses_teacher and term.is_trained for term in report.terms)
    if student is None:
        return
    if not math.isfinite(student):
        yield (
            f"the student's loss at the start is {student}, so the run will fail: its weights or its precision are "
            "unusable; choose another checkpoint, or precision fp32"
        )
    elif student > guessing + _WORSE_THAN_GUESSING:
        yield (
            f"the student's loss at the start, {student:.2f}, is worse than that of guessing among all ids "
            f"({guessing:.2f}): of a pretrained student check that it has the teacher's tokenizer and was saved whole; "
            "a fresh one has weights that are too large"
        )
    elif distils and teacher is not None and teacher >= student:
        yield (
            f"the teacher's loss, {teacher:.4f}, is not below the student's own, {student:.4f}, on the same positions: "
            "the student already predicts these texts as well, and distillation would make it worse. Use texts that "
            "the teacher knows better, a better teacher, or cross_entropy alone"
        )


def _about_kept_mass(report: TrainingReport) -> Iterator[str]:
    for term in report.terms:
        mass = term.kept_mass
        if mass is None or not term.is_trained:
            continue
        at, cooler = (" at its temperature", "a lower temperature, or ") if term.mode == "grid" else ("", "")
        kept = f"{term.name}: the kept ids hold {mass:.0%} of the teacher's mass{at}"
        if term.tail in ("renormalise", "drop") and mass < LOW_MASS_WITHOUT_TAIL:
            yield (
                f"{kept}, and tail {term.tail} teaches that all other ids have none; use tail bucket (or prior), or a "
                "cache with more ids, samples (hybrid) or hidden targets"
            )
        elif mass < LOW_MASS_WITH_TAIL:
            yield (
                f"{kept}; of the tail the student learns the total mass, not which ids have it. Use {cooler}a "
                "cache with more ids, samples (hybrid) or hidden targets"
            )


def _about_selection(report: TrainingReport) -> Iterator[str]:
    for term in report.terms:
        if term.is_trained and term.selected == 0:
            yield (
                f"{term.name}: select chooses none of the {count(report.sample.num_positions, 'position')} of a "
                "sample, so it trains on almost nothing; widen its bounds, or give a share (top or bottom)"
            )


def _about_memory(memory: MemoryReport) -> Iterator[str]:
    if memory.fits or memory.available_bytes is None:
        return
    state_bytes = memory.weights_bytes + memory.gradients_bytes + memory.optimiser_bytes
    if state_bytes > memory.available_bytes:
        advice = "weights and optimiser alone do not fit: use a smaller student, student.dtype bfloat16, or LoRA"
    else:
        advice = (
            "use a smaller batch_sequences with more gradient_accumulation (the same steps), gradient_checkpointing, "
            "or a smaller num_streams or shuffle_window"
        )
    yield (
        f"the run will need about {memory.total_bytes / _GIB:.2f} GiB of memory ({memory.device}), and "
        f"{memory.available_bytes / _GIB:.2f} are available; {advice}"
    )
