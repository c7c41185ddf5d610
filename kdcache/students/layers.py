"""A student made of some layers of a pretrained model: the start that DistilBERT and its like made known.

Which layers a model has is read off its modules: the lists as long as its configuration says, of an encoder-decoder
those of both halves, which keep the same ones. A new model is built from the changed configuration and loaded with the
weights that remain, strictly, so what is saved later is a plain model of its family, and a family in which layers
cannot simply be left out is refused.

Source: Sanh et al., "DistilBERT, a distilled version of BERT", 2019, section 3 (initialisation from every other layer).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from kdcache.errors import ConfigError, StudentError
from kdcache.models.loading import first_line, quiet
from kdcache.models.pooling import drop_pooler

#: Settings that count layers, in the families of transformers.
_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def with_layers(model: Any, layers: Sequence[int], name: str) -> Any:
    """Return a model of the layers ``layers`` of ``model``, counted from 0, in their order; ``name`` is for messages.

    Raises `ConfigError` for a layer that there is not, `StudentError` for a model that cannot do without the others.
    """
    stacks = _stacks(model)
    if not stacks:
        raise StudentError(
            f"the layers of student {name} ({type(model).__name__}) cannot be told apart, so keep_layers cannot choose "
            "among them; leave it out"
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
    """Return the paths of the lists of layers and how long they are: none is inside another."""
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
    # Families whose layers are of several kinds say of which each is.
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[layer] for layer in layers]
    return config


def _rebuilt(model: Any, config: Any, state: dict[str, Any], name: str) -> Any:
    with quiet():
        # Not made in float32 and cast: rotary frequencies are float32 whatever the weights are.
        student = type(model)._from_config(config, dtype=model.dtype)
    if _is_tied(student) and not _is_tied(model):
        # The configuration of a T5 always says tied; whether a checkpoint is, its weights decide.
        head = student.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    if getattr(model, "pooler", None) is None:
        drop_pooler(student)  # a model of embeddings has done without it since it was loaded
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        # Such as T5, whose first layer holds the relative positions of all.
        raise StudentError(
            f"student {name} ({type(model).__name__}) cannot do without the layers that keep_layers leaves out: "
            f"{first_line(error)} Keep layer 0 too, or leave keep_layers out"
        ) from None
    return student.eval()


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
