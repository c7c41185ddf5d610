"""``kdcache_run.json``: how a training run was made and how it went, next to the model.

It is written when the run begins, so that an unfinished run is recognised and protected, and again when it ends.
Resuming compares it with the new configuration: a run that continued with another learning rate or on another cache
would be neither of the two runs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout

from kdcache.cache import Cache
from kdcache.errors import ConfigError
from kdcache.json_files import write_json
from kdcache.students.load import Student
from kdcache.students.run_file import RUN_FILE, read_run
from kdcache.students.trained_on import cut_of
from kdcache.train.checkpoints import PARTIAL_DIR

#: Settings that may change when a run is resumed: paths, how the work is divided, what is logged and saved.
_FREE = {
    "cache",
    "output",
    "device",
    "data_threads",
    "local_store",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "gradient_checkpointing",
    # What counts is their product with the number of processes.
    "batch_sequences",
    "gradient_accumulation",
    # What counts is the number of steps that they make.
    "epochs",
    "max_steps",
}

#: Held by the process that trains into a directory.
LOCK_FILE = ".lock"

_MADE_BY_OTHERS = {"config.json", "model.safetensors", "manifest.json", "plan.json"}

_RESULTS = ("steps", "losses", "seconds", "tokens_per_s", "data_wait")


def settings_that_decide(config: Mapping[str, Any], sequences_per_step: int, steps: int) -> dict[str, Any]:
    """Return the settings on which the final weights of a run depend."""
    decided = {name: value for name, value in config.items() if name not in _FREE}
    return {**decided, "sequences_per_step": sequences_per_step, "steps": steps}


def check_output(output: str | Path, *, resume: bool) -> None:
    """Raise ``ConfigError`` if training into ``output`` would overwrite anything that is there."""
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output {path} is a file; give a directory")
    holds_run = (path / RUN_FILE).exists() or any(path.glob("checkpoint-*"))
    if holds_run and not resume:
        raise ConfigError(f"output {path} already holds a run; resume it, or choose another directory")
    # What a process leaves that is killed before its run has a record.
    ours = {LOCK_FILE, f"{RUN_FILE}.tmp", PARTIAL_DIR}
    found = sorted(item.name for item in path.iterdir() if item.name not in ours) if path.exists() else []
    if found and not holds_run:
        what = "holds a model or a cache that is not a run's" if _MADE_BY_OTHERS & set(found) else "is not empty"
        raise ConfigError(f"output {path} {what} (found {found[0]}); choose another directory")


class OutputLock:
    """The right to train into ``output``, of one process at a time; of several that share a run, the first one has it.

    As a context manager it takes the right at once where the directory exists, so that a second command ends before it
    loads anything, and gives it back at the end. `acquire` takes it for certain, and makes the directory.
    """

    def __init__(self, output: str | Path) -> None:
        self._output = Path(output)
        self._lock = FileLock(self._output / LOCK_FILE)

    def __enter__(self) -> OutputLock:
        if self._output.is_dir() and int(os.environ.get("RANK", "0")) == 0:
            self.acquire()
        return self

    def acquire(self) -> None:
        """Take the right; raises ``ConfigError`` when another process has it or the directory cannot be written."""
        if self._lock.is_locked:
            return
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another process is training into {self._output}; wait for it, or choose another output"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot write to output {self._output}: {error.strerror or error}") from None

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


@dataclass
class RunRecord:
    """The record of a run in progress."""

    path: Path
    content: dict[str, Any]
    finished: dict[str, Any] | None = None
    """The results, if the resumed run has already finished."""

    @classmethod
    def begin(
        cls,
        output: str | Path,
        *,
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        cache: Cache,
        student: Student,
        resume: bool,
        write: bool,
        terms: Mapping[str, Any] | None = None,
    ) -> RunRecord:
        """Make the record, write it (with ``write``), and compare it with the run that is resumed.

        ``terms`` describes the objective's terms and the file of their parameters.

        Raises ``ConfigError`` when the run in ``output`` had other settings or another cache.
        """
        content = {
            "status": "running",
            "settings": {**settings, "cache_fingerprint": cache.fingerprint},
            "config": dict(config),
            "cache": {
                "fingerprint": cache.fingerprint,
                "corpus": cache.manifest.corpus.fingerprint,
                "sequences": cut_of(cache),
            },
            "teacher": cache.manifest.teacher.model_dump(mode="json"),
            "tokenizer": cache.manifest.tokenizer.model_dump(mode="json"),
            "student": {
                "architecture": type(student.model).__name__,
                "num_parameters": student.num_parameters,
                "num_trainable_parameters": student.num_trainable_parameters,
            },
            **({"terms": dict(terms)} if terms else {}),
            "versions": _versions(),
        }
        # Compared as JSON would give it back.
        content = json.loads(json.dumps(content))
        before = _read_resumed(output) if resume else None
        if before is not None:
            _check_same_run(before.get("settings", {}), content["settings"], output)
            if before.get("status") == "finished":
                return cls(Path(output) / RUN_FILE, before, {name: before[name] for name in _RESULTS if name in before})
        record = cls(Path(output) / RUN_FILE, content)
        if write:
            record._write()
        return record

    def finish(self, **results: Any) -> None:
        """Write the record again with the results of the run."""
        self.content |= {"status": "finished", **results}
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.content)


def _read_resumed(output: str | Path) -> dict[str, Any] | None:
    """Return the record of the run to resume, None if there is none; raises for checkpoints without a record."""
    record, path = read_run(output), Path(output)
    if record is None and ((path / RUN_FILE).exists() or any(path.glob("checkpoint-*"))):
        state = "cannot be read" if (path / RUN_FILE).exists() else "is missing"
        raise ConfigError(
            f"cannot resume {output}: its {RUN_FILE} {state}, so nothing says with which settings and on which cache "
            "it was trained; bring that file back, or begin a new run in another directory"
        )
    return record


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ between two runs, such as ``seed was 0 and is 1``."""
    # None is the same as absent: a newer version may have more settings.
    before, after = _given(before), _given(after)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in changed]


def _check_same_run(before: Mapping[str, Any], after: Mapping[str, Any], output: str | Path) -> None:
    lines = changed_settings(before, after)
    if not lines:
        return
    raise ConfigError(
        f"cannot resume {output} with other settings: {'; '.join(lines)}. Repeat those of the run "
        f"({RUN_FILE} holds them), or begin a new run that starts from this student (student.model: {output})"
    )


def _given(settings: Any) -> Any:
    """Return ``settings`` without those that are None, at any depth."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: _given(value) for name, value in settings.items() if value is not None}


def _versions() -> dict[str, str]:
    return {
        "kdcache": version("kdcache"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
