"""``terms.safetensors``: what is trained beside a student and is no part of it.

The terms of an objective may own parameters, such as maps from the student's hidden states to the teacher's. They are
trained by the same optimiser, and a run that is resumed needs them; but the student is used without them. So they lie
in a file of their own, beside every checkpoint and beside the finished run, and the model's files never name them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcache.errors import StudentError

TERMS_FILE = "terms.safetensors"


def term_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters of ``module`` that are not those of the student under ``.model``, by name."""
    named = module.named_parameters()
    return {name: value for name, value in named if value.requires_grad and not name.startswith("model.")}


def save_terms(module: nn.Module, directory: str | Path) -> None:
    """Write what is trained beside the student, if there is anything."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in term_parameters(module).items()}
    if tensors:
        save_file(tensors, Path(directory) / TERMS_FILE)


@torch.no_grad()
def load_terms(module: nn.Module, directory: str | Path) -> None:
    """Take over what `save_terms` wrote; raises ``StudentError`` when that is missing, broken or of other terms."""
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


_ADVICE = "a run cannot be resumed without them: bring that file back, or begin a new run in another directory"
