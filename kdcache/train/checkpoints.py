"""What a run writes of its student: the finished model, checkpoints, and the parameters of the objective's terms.

A finished run and its checkpoints are plain Hugging Face directories that load without kdcache. The checkpoints of a
student with adapters hold the adapters alone, in peft's format.

A checkpoint is complete or it is not used. It is made in ``.partial``; its last file, ``kdcache_checkpoint.json``,
holds the size and the SHA-256 of every other one; then it gets its name, and only then older ones are removed. A run
resumes from the newest checkpoint whose files are those that were written. Damaged ones are named and passed over. If
no checkpoint is left, that is an error: to begin anew without being asked would lose the run.

The terms of an objective may own parameters, such as maps from the student's hidden states to the teacher's. The same
optimiser trains them, and a resumed run needs them, but the student is used without them. They are therefore stored in
``terms.safetensors``, next to the model of every checkpoint and of the finished run, and the model's files never name
them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import walk_tb

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from kdcache.errors import KdcacheError, StudentError
from kdcache.json_files import write_json
from kdcache.models.loading import first_line, quiet
from kdcache.models.pooling import drop_pooler, load_projection, without_projection
from kdcache.storage.download import file_sha256
from kdcache.students.load import Student
from kdcache.students.lora import ADAPTER_DIR, ADAPTER_WEIGHTS, load_adapter, merge_adapter, save_adapter
from kdcache.students.sentence_model import save_sentence_files

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
TERMS_FILE = "terms.safetensors"
#: The record of a complete checkpoint.
CHECKPOINT_FILE = "kdcache_checkpoint.json"
#: Directory of the checkpoint that is being written, under the output.
PARTIAL_DIR = ".partial"

_ADVICE = "a run cannot be resumed without them: bring that file back, or begin a new run in another directory"


class Checkpoints:
    """The checkpoints of a run in ``output``, of which the newest ``keep`` are kept."""

    def __init__(self, output: str | Path, *, keep: int = 1) -> None:
        self.output = Path(output)
        self.partial = self.output / PARTIAL_DIR
        self._keep = keep

    def numbered(self) -> list[tuple[int, Path]]:
        """Return the steps and directories of all checkpoints, complete or not, newest first."""
        found = []
        for path in self.output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit() and path.is_dir():
                found.append((step_of(path), path))
        return sorted(found, reverse=True)

    def newest(self) -> Path | None:
        """Return the newest undamaged checkpoint, None if there is none."""
        return next((path for _, path in self.numbered() if damage_of(path) is None), None)

    def resumed(self, *, warn: bool = True) -> Path | None:
        """Return the checkpoint to resume from, None before the first one; ``warn`` of damaged ones.

        Raises ``StudentError`` when there are checkpoints and all are damaged.
        """
        damaged: list[str] = []
        for _, path in self.numbered():
            damage = damage_of(path)
            if damage is None:
                for line in damaged if warn else ():
                    log.warning("%s, so the run resumes from %s", line, path)
                return path
            damaged.append(f"{path} cannot be used: {damage}")
        if damaged:
            raise StudentError(
                f"{'; '.join(damaged)}. There is no other checkpoint to resume from: bring the file back, or begin a "
                "new run in another directory"
            )
        return None

    def clear(self, step: int) -> None:
        """Remove the checkpoints beyond the newest up to ``step``, and what a killed process has left of one."""
        for _, path in [found for found in self.numbered() if found[0] <= step][self._keep :]:
            self._remove(path)
        self.clear_partial()

    def clear_partial(self) -> None:
        """Remove what was written of a checkpoint that is not complete."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Turn failures to write the checkpoint of ``step`` into a ``StudentError``; what was written is removed."""
        made, name = self._made(step), f"{PREFIX_CHECKPOINT_DIR}-{step}"
        before = self.numbered()
        resumes = f"resumes from {before[0][1].name}" if before else "begins again"
        try:
            with readable_failures(made, self.output / name, f"the same command {resumes}"):
                yield
        except BaseException:
            self.clear_partial()
            raise

    def complete(self, step: int) -> None:
        """Record the files of the checkpoint of ``step``, give it its name, and remove those beyond the newest."""
        made = self._made(step)
        files = {}
        for path in sorted(path for path in made.rglob("*") if path.is_file()):
            _to_disk(path)
            files[path.relative_to(made).as_posix()] = {"num_bytes": path.stat().st_size, "sha256": file_sha256(path)}
        write_json(made / CHECKPOINT_FILE, {"step": step, "files": files})
        _to_disk(made / CHECKPOINT_FILE)
        # Those of later steps are damaged: the run would have resumed from them.
        for _, path in (found for found in self.numbered() if found[0] >= step):
            self._remove(path)
        os.rename(made, self.output / made.name)
        with contextlib.suppress(OSError):  # not every file system has it for directories
            _to_disk(self.output)
        self.clear(step)

    def _made(self, step: int) -> Path:
        return self.partial / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; a process that is killed meanwhile leaves none that lacks some files."""
        if path.exists():
            removed = self.partial / f"removed-{path.name}"
            shutil.rmtree(removed, ignore_errors=True)
            self.partial.mkdir(exist_ok=True)
            os.rename(path, removed)
            shutil.rmtree(removed, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that were made before a checkpoint."""
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def damage_of(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, None for one that is as it was written."""
    try:
        record = json.loads((checkpoint / CHECKPOINT_FILE).read_bytes())
        files = {str(name): (int(file["num_bytes"]), str(file["sha256"])) for name, file in record["files"].items()}
    except FileNotFoundError:
        return f"it has no {CHECKPOINT_FILE}, which is written last"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {CHECKPOINT_FILE} cannot be read"
    if STATE_FILE not in files:
        return f"its {CHECKPOINT_FILE} does not name {STATE_FILE}"
    for name, (num_bytes, sha256) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != num_bytes:
            return f"its file {name} has {path.stat().st_size:,} of {num_bytes:,} bytes"
        if file_sha256(path) != sha256:
            return f"its file {name} is damaged (its sha256 is not the recorded one)"
    return None


def _to_disk(path: Path) -> None:
    """Wait until a file or a directory has reached the disk: a checkpoint may be the only one left."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def readable_failures(made: Path, named: Path, advice: str) -> Iterator[None]:
    """Turn the failure to write a file below ``made`` (for the user: ``named``) into a ``StudentError``.

    Libraries of several languages write these files, and a full disk is another error in each. Where an error does not
    tell its file, that is the one which was changed last.
    """
    try:
        yield
    except KdcacheError:
        raise
    except Exception as error:
        reason = _reason_of(error)
        if reason is None:
            raise
        path = _file_of(error) or _changed_last(made)
        place = named / path.relative_to(made) if path is not None and path.is_relative_to(made) else path or named
        # Of an error that is no OSError nobody says what it was: a full disk, as a rule.
        is_full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        remedy = "Make room" if is_full else "Put that right"
        raise StudentError(f"cannot write {place}: {reason}. {remedy}, and {advice}") from None


def _reason_of(error: Exception) -> str | None:
    """Return why a file could not be written, None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    text = first_line(error)
    if "os error" in text:  # of tokenizers, which are written in Rust
        return text
    return f"torch.save failed ({text})" if _saved_by_torch(error) else None


def _file_of(error: Exception) -> Path | None:
    name = error.filename if isinstance(error, OSError) else _saved_by_torch(error)
    return Path(name) if name else None


def _saved_by_torch(error: Exception) -> str | None:
    """Return the file in whose ``torch.save`` an error was raised; the error itself does not tell."""
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code is torch.save.__code__:
            return str(frame.f_locals.get("f"))
    return None


def _changed_last(directory: Path) -> Path | None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    """Turn the failure to write ``path``, which safetensors removes again, into an ``OSError`` that names it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error), str(path)) from None


def check_finite(module: nn.Module, error: Callable[[str], Exception]) -> None:
    """Raise ``error`` of a description when a parameter is NaN or infinite."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise error(f"its weights are NaN or infinite (in {name.removeprefix('model.')})")


def save_student(student: Student, output: str | Path) -> None:
    """Write a trained student, model and tokenizer, as a plain Hugging Face directory.

    Adapters are written to ``adapter`` under it and merged into the model, which ends their training.
    """
    if student.adapter is not None:
        with _safetensors(Path(output) / ADAPTER_DIR / ADAPTER_WEIGHTS):
            save_adapter(student.adapter, Path(output) / ADAPTER_DIR)
        merge_adapter(student.adapter)
    with quiet(), without_projection(student.model), _safetensors(Path(output) / SAFE_WEIGHTS_NAME):
        student.model.save_pretrained(output)
    student.tokenizer.save_pretrained(output)
    if student.sentence is not None:
        save_sentence_files(student.model, student.sentence, output)


def save_weights(student: Student, output: str | Path) -> None:
    """Write the weights that a checkpoint holds: of a student with adapters, these alone."""
    if student.adapter is None:
        save_student(student, output)
        return
    with _safetensors(Path(output) / ADAPTER_WEIGHTS):
        save_adapter(student.adapter, output)


def load_weights(student: Student, checkpoint: str | Path) -> None:
    """Load the weights that `save_weights` wrote for the same student."""
    if student.adapter is not None:
        load_adapter(student.adapter, checkpoint)
        return
    model = student.model
    with quiet():
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype, trust_remote_code=False)
    if student.sentence is not None:
        load_projection(saved, str(checkpoint), error=StudentError)
    if getattr(model, "pooler", None) is None:
        drop_pooler(saved)  # a model of embeddings was loaded without it
    model.load_state_dict(saved.state_dict())


def term_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters of ``module`` that are not those of the student under ``.model``, by name."""
    named = module.named_parameters()
    return {name: value for name, value in named if value.requires_grad and not name.startswith("model.")}


def save_terms(module: nn.Module, directory: str | Path) -> None:
    """Write the parameters of the terms, if there are any."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in term_parameters(module).items()}
    if tensors:
        with _safetensors(Path(directory) / TERMS_FILE):
            save_file(tensors, Path(directory) / TERMS_FILE)


@torch.no_grad()
def load_terms(module: nn.Module, directory: str | Path) -> None:
    """Load what `save_terms` wrote; raises ``StudentError`` when it is missing, unreadable or of other terms."""
    parameters = term_parameters(module)
    if not parameters:
        return
    path = Path(directory) / TERMS_FILE
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StudentError(f"{path} cannot be read ({error}); {_ADVICE}") from None
    if {name: value.shape for name, value in saved.items()} != {n: value.shape for n, value in parameters.items()}:
        raise StudentError(f"{path} does not hold the parameters of this objective's terms; {_ADVICE}")
    for name, value in parameters.items():
        value.copy_(saved[name])
