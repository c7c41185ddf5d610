"""Sentence models: pool token states into one vector, as sentence-transformers does, and read and write its files.

``modules.json`` of a sentence-transformers directory names what follows the model itself: a pooling, perhaps a linear
layer (Dense) that gives the vector another width, perhaps a normalisation. A plain Hugging Face directory has none of
it. The linear layer becomes a module of the model, so that it is moved, trained and counted with it; when a model is
saved the layer is written separately (`without_projection`).

Shape suffixes: B sequences, L positions, D width of the states, C of the vectors.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import KdcacheError, TeacherError, shortened
from kdcache.models.trying import in_eval_mode

#: Name of the linear layer among a model's modules.
PROJECTION = "sentence_projection"

_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
_ACTIVATIONS: dict[str, type[nn.Module]] = {"Identity": nn.Identity, "Tanh": nn.Tanh}


@dataclass(frozen=True)
class SentenceModules:
    """The modules that a sentence-transformers directory names for its model."""

    pooling: str
    normalised: bool
    dense: str | None = None
    """Folder of the linear layer."""
    width: int | None = None
    """Width of the vectors where a linear layer decides it."""


def pool(states_BLD: Tensor, attention_mask_BL: Tensor, pooling: str) -> Tensor:
    """Return one vector for each sequence, [B, D]: the mean of its token states, or the first or last of them.

    Sequences are padded on the right.
    """
    if pooling == "cls":
        return states_BLD[:, 0]
    if pooling == "last":
        last_B = attention_mask_BL.sum(1) - 1
        return states_BLD[torch.arange(len(states_BLD), device=states_BLD.device), last_B]
    mask_BL1 = attention_mask_BL[:, :, None].to(states_BLD.dtype)
    return (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)


def project(model: Any, pooled_BD: Tensor) -> Tensor:
    """Return pooled vectors after the model's linear layer, [B, C]; unchanged if it has none."""
    projection = getattr(model, PROJECTION, None)
    return pooled_BD if projection is None else projection(pooled_BD)


def vector_width(model: Any) -> int:
    """Return the width of the vectors that the states of a model are turned into."""
    projection = getattr(model, PROJECTION, None)
    return int(model.config.get_text_config().hidden_size if projection is None else projection[0].out_features)


@torch.no_grad()
def drop_pooler(model: Any) -> None:
    """Remove the pooler of models like BERT, which nothing here uses.

    It would get no gradients, and distributed training waits for the gradients of all parameters. Where the model's own
    code cannot do without (SqueezeBERT), the pooler stays and is not trained.
    """
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return
    model.pooler = None
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with in_eval_mode(model):
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    except Exception:  # whatever the code of the architecture raises
        model.pooler = pooler.requires_grad_(False)


def modules_of(
    name: str, revision: str | None = None, error: type[KdcacheError] = TeacherError
) -> SentenceModules | None:
    """Return what the sentence-transformers files of a model name; None if it has none.

    Raises ``error`` for a pooling that is not mean, cls or last, and for modules that cannot be run.
    """
    try:
        return _parse_modules(name, revision, error)
    except (LookupError, TypeError, ValueError, AttributeError) as failure:
        raise error(f"modules.json of {name} cannot be read: {shortened(failure)}; download the model again") from None


def _parse_modules(name: str, revision: str | None, error: type[KdcacheError]) -> SentenceModules | None:
    modules = _read(name, "modules.json", revision)
    if modules is None:
        return None
    paths: dict[str, str] = {}
    for module in modules:
        package, _, kind = str(module["type"]).rpartition(".")
        path = str(module["path"])
        if package.partition(".")[0] != "sentence_transformers":
            raise error(
                f"{name} has a module of its own Python code in modules.json ({shortened(module['type'])}), which "
                "kdcache never runs; use another model"
            )
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize") or kind in paths:
            raise error(f"{name} has a module {kind} in modules.json that task embedding cannot run")
        if path.startswith("/") or set(path) & set("\\:") or ".." in path.split("/"):
            raise error(f"{name} has a module in {shortened(path)} in modules.json, which is not in the model's folder")
        paths[kind] = path
    settings = _read(name, f"{paths['Pooling']}/config.json", revision) if "Pooling" in paths else None
    if settings is None:
        return None
    dense = paths.get("Dense")
    width = None if dense is None else int(_read(name, f"{dense}/config.json", revision)["out_features"])
    return SentenceModules(_mode(settings, name, error), "Normalize" in paths, dense, width)


def add_projection(model: Any, projection: nn.Sequential) -> None:
    """Make ``projection`` (a linear layer and its activation) a module of ``model``, in its dtype."""
    like = next(model.parameters())
    model.add_module(PROJECTION, projection.to(like.device, like.dtype))


@contextlib.contextmanager
def without_projection(model: Any) -> Iterator[None]:
    """Take the linear layer out of a model for a while, so that the model is saved without it."""
    projection = getattr(model, PROJECTION, None)
    if projection is not None:
        delattr(model, PROJECTION)
    try:
        yield
    finally:
        if projection is not None:
            model.add_module(PROJECTION, projection)


def load_projection(
    model: Any, name: str, revision: str | None = None, error: type[KdcacheError] = TeacherError
) -> None:
    """Add to ``model`` the linear layer stored with it in ``name``, if there is one; raises ``error``."""
    modules = modules_of(name, revision, error)
    if modules is None or modules.dense is None:
        return
    settings = _read(name, f"{modules.dense}/config.json", revision)
    activation = str(settings.get("activation_function", "Identity")).rpartition(".")[2]
    if activation not in _ACTIVATIONS or settings.get("use_residual"):
        raise error(
            f"the Dense layer of {name} has the activation {activation}"
            f"{' and a residual' * bool(settings.get('use_residual'))}; expected {' or '.join(_ACTIVATIONS)} alone"
        )
    linear = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    try:
        linear.load_state_dict(_dense_weights(name, modules.dense, revision))
    except pickle.UnpicklingError:
        raise error(
            f"the Dense layer of {name} is pickled with more than tensors, which may be code, and kdcache never runs "
            "it; use a copy of the model in safetensors"
        ) from None
    except Exception as failure:  # torch, safetensors and the hub client have no common base
        raise error(f"the Dense layer of {name} cannot be loaded: {shortened(failure)}") from None
    add_projection(model, nn.Sequential(linear, _ACTIVATIONS[activation]()))


def _dense_weights(name: str, folder: str, revision: str | None) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    safe = _find(name, f"{folder}/model.safetensors", revision)
    if safe is not None:
        found = load_file(safe)
    else:
        pickled = _find(name, f"{folder}/pytorch_model.bin", revision)
        if pickled is None:
            raise OSError(f"{folder} has no weights")
        found = torch.load(pickled, map_location="cpu", weights_only=True)
    return {key.removeprefix("linear."): tensor for key, tensor in found.items()}


def _mode(settings: dict[str, Any], name: str, error: type[KdcacheError]) -> str:
    if "pooling_mode" in settings:  # newer versions name the mode
        chosen = [str(settings["pooling_mode"]).replace("lasttoken", "last")]
    else:
        chosen = [mode for key, mode in _MODES.items() if settings.get(key)]
        chosen += [
            key
            for key, value in settings.items()
            if key.startswith("pooling_mode") and value is True and key not in _MODES
        ]
    if len(chosen) != 1 or chosen[0] not in _MODES.values():
        raise error(f"{name} pools by {', '.join(chosen)}; expected one of {', '.join(_MODES.values())}")
    return chosen[0]


def _find(name: str, file: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _read(name: str, file: str, revision: str | None) -> Any:
    path = _find(name, file, revision)
    return None if path is None else json.loads(path.read_text())
