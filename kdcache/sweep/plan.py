"""Check a whole sweep before its first student trains.

Every cache is opened, every distinct student is loaded once and discarded, every run is prepared as `train-student`
would, and what the output already holds is compared with the settings. A misspelt key in the last variation is then
found in the first minute, and not after a night.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError, KdcacheError
from kdcache.losses import ObjectiveConfig
from kdcache.progress import bar
from kdcache.students import Student, load_student
from kdcache.students.load import longest_input
from kdcache.students.run_file import read_run
from kdcache.sweep.config import SweepConfig
from kdcache.sweep.variations import Variation, expand
from kdcache.train.prepare import check_machine, open_training_cache, prepare
from kdcache.train.run_record import changed_settings, check_output, settings_that_decide


@dataclass(frozen=True)
class PlannedRun:
    """A student that a sweep will train; ``state`` of its directory is ``new``, ``begun`` or ``finished``.

    ``num_positions`` is about that of all its steps: steps times the mean of a step.
    """

    variation: Variation
    num_parameters: int
    steps: int
    num_positions: int
    state: str

    @property
    def name(self) -> str:
        """The name of the run, and of its directory."""
        return self.variation.name

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective that it trains on."""
        assert self.variation.config.objective is not None  # named by its preparation
        return self.variation.config.objective

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        variation = self.variation
        return {
            "name": self.name,
            "variation": variation.group,
            "seed": variation.seed,
            "settings": variation.changes,
            "objective": {name: part.model_dump() for name, part in self.objective.parts.items()},
            "output": variation.config.output,
            "num_parameters": self.num_parameters,
            "steps": self.steps,
            "num_positions": self.num_positions,
            "state": self.state,
        }


@dataclass(frozen=True)
class SweepPlan:
    """The checked students of a sweep; ``held_out`` is the path and the fingerprint of the held-out cache."""

    config: SweepConfig
    runs: tuple[PlannedRun, ...]
    held_out: tuple[str, str] | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        data = {
            "output": self.config.output,
            "held_out": self.config.held_out,
            "num_runs": len(self.runs),
            "steps": sum(run.steps for run in self.runs),
            "num_positions": sum(run.num_positions for run in self.runs),
            "runs": [run.to_dict() for run in self.runs],
        }
        plain: dict[str, Any] = json.loads(json.dumps(data, default=str))
        return plain


def preview_sweep(config: SweepConfig, *, progress: bool = False) -> SweepPlan:
    """Check a whole sweep and return its students; nothing is written and nothing trained.

    Every different student is loaded once, which takes a while where they are large; ``progress`` shows a bar.

    Raises what training the first wrong one would raise, with its name in front: ``ConfigError``, ``CacheError`` or
    ``StudentError``; also ``ConfigError`` when a run in the output was made with other settings.
    """
    variations = expand(config)
    _check_output(Path(config.output))
    for variation in variations:
        with _named(variation):
            check_machine(variation.config)
    caches = {key: open_training_cache(group[0].config) for key, group in _by(variations, _cache_key)}
    held_out = None if config.held_out is None else open_cache(config.held_out)
    runs: dict[str, PlannedRun] = {}
    groups = list(_by(variations, _student_key))
    with bar(len(variations), "check", "student", enabled=progress) as meter:
        for (key, *_), group in groups:
            runs |= _check_students(group, caches[key], held_out)
            meter.update(len(group))
    where = None if held_out is None else (str(config.held_out), held_out.fingerprint)
    return SweepPlan(config, tuple(runs[variation.name] for variation in variations), where)


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file; give a directory for the students")
    found = [name for name in ("manifest.json", "plan.json", "config.json") if (output / name).exists()]
    if found:
        raise ConfigError(f"output {output} holds a cache or a model (found {found[0]}); choose another directory")


@contextmanager
def _named(variation: Variation) -> Iterator[None]:
    """Put the name of a variation in front of the message of any error."""
    try:
        yield
    except KdcacheError as error:
        raise type(error)(f"variation {variation.name}: {error}") from None


def _by(variations: Sequence[Variation], key_of: Any) -> Iterator[tuple[Any, list[Variation]]]:
    groups: dict[Any, list[Variation]] = {}
    for variation in variations:
        groups.setdefault(key_of(variation), []).append(variation)
    return iter(groups.items())


def _cache_key(variation: Variation) -> str:
    return variation.config.cache


def _student_key(variation: Variation) -> tuple[str, str]:
    """Return a key that is equal for variations with the same student, up to the seed of its weights."""
    return variation.config.cache, variation.config.student.model_copy(update={"seed": 0}).model_dump_json()


def _check_students(group: Sequence[Variation], cache: Cache, held_out: Cache | None) -> dict[str, PlannedRun]:
    """Check variations that start from the same student on the same cache."""
    with _named(group[0]):
        _check_held_out(cache, held_out)
        config, longest = group[0].config.student, longest_input(cache)
        student = load_student(config, cache.manifest, cache.tokenizer_dir(), longest=longest)
    planned = {}
    for variation in group:
        with _named(variation):
            planned[variation.name] = _check(variation, cache, student)
    return planned


def _check_held_out(cache: Cache, held_out: Cache | None) -> None:
    if held_out is not None and held_out.manifest.tokenizer.sha256 != cache.manifest.tokenizer.sha256:
        raise ConfigError(
            "the held-out cache has another tokenizer than the cache that is trained on, so students cannot be "
            "evaluated on it; dump one of held-out texts with the same teacher"
        )


def _check(variation: Variation, cache: Cache, student: Student) -> PlannedRun:
    run = prepare(variation.config, cache=cache, student=student)
    batches = run.micro_batches()
    steps = run.num_steps(batches)
    settings = settings_that_decide(run.config.model_dump(mode="json"), batches.sequences_per_step, steps)
    per_step = cache.manifest.num_positions / len(cache) * min(batches.sequences_per_step, batches.num_sequences)
    return PlannedRun(
        replace(variation, config=run.config),
        student.num_parameters,
        steps,
        round(steps * per_step),
        _state(run.config.output, {**settings, "cache_fingerprint": cache.fingerprint}),
    )


def _state(output: str, settings: dict[str, Any]) -> str:
    """Return the state of a run's directory; raises ``ConfigError`` if it holds anything but this very run."""
    check_output(output, resume=True)
    before = read_run(output)
    if before is None:
        if any(Path(output).glob("checkpoint-*")):
            raise ConfigError(f"{output} holds checkpoints without a record of their run; move it away")
        return "new"
    state = "finished" if before.get("status") == "finished" else "begun"
    changed = changed_settings(before.get("settings", {}), json.loads(json.dumps(settings)))
    if changed:
        raise ConfigError(
            f"{output} holds a run that was {state} with other settings: {'; '.join(changed)}. Give the variation "
            "another name or the sweep another output, or remove that directory"
        )
    return state
