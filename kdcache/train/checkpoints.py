"""What a run writes of its student: the finished model, checkpoints, and the parameters of the objective's terms.

A finished run and its checkpoints are plain Hugging Face directories that load without kdcache. The checkpoints of a
student with adapters hold the adapters alone, in peft's format.

The terms of an objective may own parameters, such as maps from the student's hidden states to the teacher's. The same
optimiser trains them, and a resumed run needs them, but the student is used without them. They are therefore stored in
``terms.safetensors``, next to the model of every checkpoint and of the finished run, and the model's files never name
them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kdcache.errors import StudentError
from kdcache.models.loading import quiet
from kdcache.models.pooling import drop_pooler, load_projection, without_projection
from kdcache.students.load import Student
from kdcache.students.lora import ADAPTER_DIR, load_adapter, merge_adapter, save_adapter
from kdcache.students.sentence_model import save_sentence_files

STATE_FILE = "trainer_state.json"
TERMS_FILE = "terms.safetensors"

_ADVICE = "a run cannot be resumed without them: bring that file back, or begin a new run in another directory"


def save_student(student: Student, output: str | Path) -> None:
    """Write a trained student, model and tokenizer, as a plain Hugging Face directory.

    Adapters are written to ``adapter`` under it and merged into the model, which ends their training.
    """
    if student.adapter is not None:
        save_adapter(student.adapter, Path(output) / ADAPTER_DIR)
        merge_adapter(student.adapter)
    with quiet(), without_projection(student.model):
        student.model.save_pretrained(output)
    student.tokenizer.save_pretrained(output)
    if student.sentence is not None:
        save_sentence_files(student.model, student.sentence, output)


def save_weights(student: Student, output: str | Path) -> None:
    """Write the weights that a checkpoint holds: of a student with adapters, these alone."""
    if student.adapter is None:
        save_student(student, output)
    else:
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


def last_checkpoint(output: str | Path) -> Path | None:
    """Return the newest *complete* checkpoint under ``output``: its state is written last, so it must be readable."""
    numbered = []
    for path in Path(output).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        suffix = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if suffix.isdigit() and _readable(path / STATE_FILE):
            numbered.append((int(suffix), path))
    return max(numbered)[1] if numbered else None


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def term_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters of ``module`` that are not those of the student under ``.model``, by name."""
    named = module.named_parameters()
    return {name: value for name, value in named if value.requires_grad and not name.startswith("model.")}


def save_terms(module: nn.Module, directory: str | Path) -> None:
    """Write the parameters of the terms, if there are any."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in term_parameters(module).items()}
    if tensors:
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
