"""Make a student of some layers of a pretrained model, as DistilBERT was made.

The stacks of layers are found among the model's modules, as lists of the length that its configuration says; an
encoder-decoder keeps the same layers of both halves. A new model is built from the changed configuration and loaded
strictly with the weights that remain. What is saved later is therefore a plain model of its family, and a family in
which layers cannot be left out raises an error.

Source: Sanh et al., "DistilBERT, a distilled version of BERT", 2019, section 3 (initialisation from every other layer).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from kdcache.errors import ConfigError, StudentError, first_line
from kdcache.models.internals import model_from_config
from kdcache.models.loading import quiet
from kdcache.models.pooling import drop_pooler

#: Settings with the number of layers, in the families of transformers.
_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def with_layers(model: Any, layers: Sequence[int], name: str) -> Any:
    """Return a model of the layers ``layers`` of ``model``, counted from 0, in their order; ``name`` is for messages.

    Raises `ConfigError` for a layer that does not exist, `StudentError` for a model that does not work without the
    others.
    """
    stacks = _stacks(model)
    if not stacks:
        raise StudentError(
            f"keep_layers: no stack of layers was found in student {name} ({type(model).__name__}); remove it, or "
            "choose another student"
        )
    num_layers = min(stacks.values())
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong:
        raise ConfigError(f"keep_layers: student {name} has layers 0 to {num_layers - 1}, found {wrong[0]}")
    kept = {f"{path}.{layer}.": f"{path}.{n}." for path in stacks for n, layer in enumerate(layers)}
    dropped = tuple(f"{path}.{layer}." for path, count in stacks.items() for layer in range(count))
    state = {}
    for key, value in model.state_dict().items():
        old = next((prefix for prefix in kept if key.startswith(prefix)), None)
        if old is not None:
            state[kept[old] + key.removeprefix(old)] = value
        elif not key.startswith(dropped):
            state[key] = value
    return _rebuilt(model, _shortened(model.config, layers), state, name)


def _stacks(model: Any) -> dict[str, int]:
    """Return the lengths of the lists of layers by their paths; none is inside another."""
    counts = {getattr(model.config.get_text_config(), name, None) for name in _COUNTS} - {None}
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        is_stack = isinstance(module, nn.ModuleList) and len(module) in counts
        if is_stack and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = len(module)
    return found


def _shortened(config: Any, layers: Sequence[int]) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    counts = {name: getattr(text, name) for name in _COUNTS if isinstance(getattr(text, name, None), int)}
    for name in counts:
        setattr(text, name, len(layers))
    # In families with several kinds of layers the configuration lists the kind of each.
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[layer] for layer in layers]
    return config


def _rebuilt(model: Any, config: Any, state: dict[str, Any], name: str) -> Any:
    with quiet():
        # Not made in float32 and cast: rotary frequencies stay float32 whatever the dtype of the weights.
        student = model_from_config(type(model), config, model.dtype)
    if _is_tied(student) and not _is_tied(model):
        # The configuration of a T5 always says tied; the weights of the checkpoint decide.
        head = student.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    if getattr(model, "pooler", None) is None:
        drop_pooler(student)  # models of embeddings are loaded without it
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        # Such as T5, whose first layer holds the relative positions for all layers.
        raise StudentError(
            f"student {name} ({type(model).__name__}) does not work without the layers that keep_layers omits: "
            f"{first_line(error)} Keep layer 0 too, or remove keep_layers"
        ) from None
    return student.eval()


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
