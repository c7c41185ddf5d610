"""What is known of a training run before its first step: records, their text, and what in them is cause for concern.

A run that cannot work out looks like any other for hours: a teacher that is no better than the student, kept ids that
hold half of the teacher's mass, a micro-batch that does not fit. All of that can be seen beforehand (module `plan`
measures it). What is wrong for certain is refused with an error; what is listed here as a warning may be intended.
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

#: Kept mass below which there is a warning: where the tail is thrown away, and where its mass at least is learnt.
LOW_MASS_WITHOUT_TAIL = 0.7
LOW_MASS_WITH_TAIL = 0.5
#: A student that knows nothing has log V; one that is this many nats worse is sure of wrong things.
_WORSE_THAN_GUESSING = 1.0

_GIB = 1 << 30


class TermReport(Config):
    """One term of the objective: its settings as this cache resolves them, and what it is before the first step.

    ``weight`` and ``temperature`` at the first step, with ``_end`` at the last (they differ where there is a schedule);
    ``is_trained`` says whether the weight is above 0 at any time.
    ``kept_mass`` is the teacher's mass on the ids that the term compares one by one, at its temperature and lowest over
    the run; None where samples stand for the teacher or the teacher plays no part. ``selected`` is the share of the
    sample's positions that the term looks at, None where that is all; ``value`` the mean per position on the sample,
    unweighted; ``ms_per_1000_positions`` the time that the term adds to the others, where it was measured.
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
    """Positions of a step, each a token or a row as ``unit`` says."""
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
        """What whoever starts the run should know, with what to do about it."""
        return (*_about_losses(self), *_about_kept_mass(self), *_about_selection(self), *_about_memory(self.memory))

    def to_dict(self) -> dict[str, Any]:
        """Return everything with the warnings as plain JSON types; None for a number that is not finite."""
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
            f"student {self.student}, {self.num_trainable_parameters:,} parameters to train" + losses_text(sample),
            "objective: " + "; ".join(f"{term_text(term)}, now {term.value:.4f}" for term in self.terms),
            f"{self.steps:,} steps of about {self.tokens_per_step:,} {self.unit}s; memory about "
            f"{memory.total_bytes / _GIB:.2f}{of} GiB ({memory.device})",
            *(f"warning: {warning}" for warning in self.warnings),
        ]


def losses_text(sample: SampleReport) -> str:
    """Return the losses of student and teacher in words; nothing where there are none."""
    if sample.student_loss is None or sample.teacher_loss is None:
        return ""
    return (
        f": loss {sample.student_loss:.4f} at the start, the teacher's {sample.teacher_loss:.4f} on the same "
        f"{sample.num_positions:,} positions"
    )


def term_text(term: TermReport) -> str:
    """Return a term's settings in words: ``0.9 forward_kl (temperature 2, mode decoupled, tail bucket)``."""
    settings = {"temperature": course(term.temperature, term.temperature_end), "mode": term.mode, "tail": term.tail}
    given = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    return f"{course(term.weight, term.weight_end)} {term.name}" + (f" ({given})" if given else "")


def course(start: float | None, end: float | None) -> str | None:
    """Return ``2``, or ``2 -> 1`` where a value changes during the run; None for None."""
    if start is None or end is None:
        return None
    return f"{start:g}" if start == end else f"{start:g} -> {end:g}"


def _about_losses(report: TrainingReport) -> Iterator[str]:
    student, teacher, guessing = report.sample.student_loss, report.sample.teacher_loss, math.log(report.vocab_size)
    distils = any(term.uses_teacher and term.is_trained for term in report.terms)
    if student is None or teacher is None:
        return
    if not math.isfinite(student):
        yield (
            f"the student's loss at the start is {student}: its weights or its precision cannot take these texts, and "
            "the run will fail; choose another checkpoint, or precision fp32"
        )
    elif student > guessing + _WORSE_THAN_GUESSING:
        yield (
            f"the student's loss at the start, {student:.2f}, is worse than that of guessing among all ids "
            f"({guessing:.2f}): a pretrained student should be better, so check that it has the teacher's tokenizer "
            "and was saved whole; a fresh one has weights that are too large"
        )
    elif distils and teacher >= student:
        yield (
            f"the teacher's loss, {teacher:.4f}, is not below the student's own, {student:.4f}, on the same positions: "
            "the student already predicts these texts as well, and distillation would pull it back. Use texts that the "
            "teacher knows better, a better teacher, or cross_entropy alone"
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
                f"{kept}, and tail {term.tail} teaches that there is nothing else; use tail bucket (or prior), or a "
                "cache with more ids, samples (hybrid) or hidden targets"
            )
        elif mass < LOW_MASS_WITH_TAIL:
            yield (
                f"{kept}; of the rest the student learns its sum and not which ids it is made of. Use {cooler}a "
                "cache with more ids, samples (hybrid) or hidden targets"
            )


def _about_selection(report: TrainingReport) -> Iterator[str]:
    for term in report.terms:
        if term.is_trained and term.selected == 0:
            yield (
                f"{term.name}: select chooses none of the {report.sample.num_positions:,} positions of a sample, so "
                "there is hardly anything that it trains on; widen its bounds, or give a share (top or bottom)"
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
