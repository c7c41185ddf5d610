"""Make a student's vocabulary that of the cache's tokenizer: its rows, its special ids, its chat template.

Many models have more rows than their tokenizer has ids, to make the number a round one. Losses and evaluation leave
those rows out, and they are not trained. The saved model would still give them probability, more the longer the others
are trained, and would generate ids that no tokenizer has. So they are removed when a student is loaded: what is
trained, evaluated and saved is one distribution (docs/decisions/0029).

A student learns to end texts as the teacher's texts end, so its configuration names the tokenizer's ids, too.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from kdcache.errors import StudentError, first_line
from kdcache.models.bodies import num_input_ids
from kdcache.models.internals import model_from_config
from kdcache.models.loading import quiet
from kdcache.tasks import Task

log = logging.getLogger(__name__)


def trim_rows(model: Any, vocab_size: int, name: str, *, remove: bool = True) -> None:
    """Remove the rows of embeddings and LM head for ids from ``vocab_size`` on; ``name`` is for messages.

    Without ``remove`` only warn of them. Raises ``StudentError`` for an architecture in which that is impossible.
    """
    num_rows = num_input_ids(model)
    if num_rows <= vocab_size:
        return
    log.warning(
        "student %s has rows for %d ids, and its tokenizer has %d. %s",
        name,
        num_rows,
        vocab_size,
        "The others are removed, here and in what is saved: the model would give them probability, and no text has them"
        if remove
        else "The others are left out here; the model itself gives them probability, so its own loss is higher",
    )
    if not remove:
        return
    try:
        _cut(model, num_rows, vocab_size)
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise StudentError(_cannot_trim(model, vocab_size, name, first_line(error))) from None
    head = model.get_output_embeddings()
    found = {len(model.get_input_embeddings().weight), *([] if head is None else [len(head.weight)])}
    if found != {vocab_size}:
        raise StudentError(_cannot_trim(model, vocab_size, name, f"{max(found)} stay"))


def _cut(model: Any, num_rows: int, vocab_size: int) -> None:
    """Cut every tensor that has a row per id, whatever the architecture calls it.

    They are those that would have another shape in a model whose configuration says ``vocab_size``. They are cut in
    place, so tied ones stay tied; ``resize_token_embeddings`` of transformers would tie the embeddings and the head of
    a T5 whose checkpoint has two, and knows not all biases.
    """
    config = copy.deepcopy(model.config)
    _set_vocab_size(config, num_rows, vocab_size)
    with quiet(), torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in _tensors(model_from_config(type(model), config, model.dtype))}
    for name, tensor in _tensors(model):
        shape = wanted.get(name, tensor.shape)
        if tensor.shape != shape:  # a tied one has been cut under its first name
            pairs = list(zip(tensor.shape, shape, strict=False))
            if len(shape) != tensor.ndim or any(
                old != new and (old, new) != (num_rows, vocab_size) for old, new in pairs
            ):
                raise ValueError(f"{name} would change from {list(tensor.shape)} to {list(shape)}")
            tensor.data = tensor.data[tuple(slice(size) for size in shape)].clone()
    _set_vocab_size(model.config, num_rows, vocab_size)
    for module in model.modules():
        if getattr(module, "vocab_size", None) == num_rows:
            module.vocab_size = vocab_size
        if isinstance(module, nn.Linear):
            module.out_features = len(module.weight)
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(module.weight)
            if (module.padding_idx or 0) >= module.num_embeddings:
                module.padding_idx = None


def _tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    parameters = model.named_parameters(remove_duplicate=False)
    return [*parameters, *model.named_buffers(remove_duplicate=False)]


def _set_vocab_size(config: Any, num_rows: int, vocab_size: int) -> None:
    """Set the size in a configuration and in those inside it that have the same."""
    for part in (config, config.get_text_config(), config.get_text_config(decoder=True)):
        if getattr(part, "vocab_size", None) == num_rows:
            part.vocab_size = vocab_size
        if (getattr(part, "pad_token_id", None) or 0) >= vocab_size:  # one of the rows: no model could be built
            part.pad_token_id = None


def _cannot_trim(model: Any, vocab_size: int, name: str, reason: str) -> str:
    return (
        f"student {name} ({type(model).__name__}) has more rows than the {vocab_size} ids of its tokenizer, and its "
        f"architecture does not let them be removed ({reason}); choose another student"
    )


def align_special_ids(model: Any, tokenizer: Any, task: Task) -> None:
    """Set the ids that begin, end and pad a text, in the configurations of ``model``, to those of ``tokenizer``.

    A list of ids that end a text stays if the tokenizer's is among them. Only the ids that end a text are changed in
    encoder-decoders and encoders: from the others they derive positions and the inputs of their decoders.
    """
    kinds = ("bos", "eos", "pad") if task.is_causal else ("eos",)
    vocab_size = num_input_ids(model)
    generation = getattr(model, "generation_config", None)
    for config in filter(None, (model.config, model.config.get_text_config(), generation)):
        for kind in kinds:
            _align(config, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"), vocab_size)


def _align(config: Any, setting: str, own: int | None, vocab_size: int) -> None:
    found = getattr(config, setting, None)
    if not hasattr(config, setting):
        return
    ids = found if isinstance(found, list | tuple) else [] if found is None else [found]
    if own is not None and own not in ids:
        setattr(config, setting, own)
    elif any(number >= vocab_size for number in ids):  # one of the removed rows
        rest = [number for number in ids if number < vocab_size]
        setattr(config, setting, rest or None)


def keep_chat_template(tokenizer: Any, own: Any, name: str) -> None:
    """Give the saved ``tokenizer``, the cache's, the chat template of the student's ``own`` one, unless it has one.

    A template of the cache's tokenizer may have made the texts that the student learns from, so it comes first.
    """
    template = getattr(own, "chat_template", None)
    if not template or tokenizer.chat_template == template:
        return
    if not tokenizer.chat_template:
        tokenizer.chat_template = template
        return
    log.warning(
        "student %s has another chat template than the teacher of the cache: it is saved with the teacher's", name
    )
