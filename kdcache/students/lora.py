"""Low-rank adapters (LoRA, Hu et al. 2021): train a few small matrices and freeze the weights.

peft puts the adapters into the model's own modules. The student therefore stays the Hugging Face model that it was, its
body yields adapted hidden states, and its head stays the model's own. The `PeftModel` around it is kept only to save,
load and merge the adapters.

Checkpoints of a run hold the adapters alone, in peft's format. The finished run is a plain model with the adapters
merged into its weights, so using it does not need peft; the adapters themselves are saved in ``RUN/adapter``.

Only linear layers of the body can be adapted. The losses multiply by the LM head's weight itself, chunk by chunk, so
an adapter on the head would have no effect. Embeddings cannot be adapted either: their weight is often the head's.

When to use it: for students whose gradients and optimiser state do not fit in memory, or for a few hours on a laptop. A
small student trained on many tokens gains from training all of its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from kdcache.errors import ConfigError, StudentError, did_you_mean
from kdcache.models.loading import quiet
from kdcache.students.config import ALL_LINEAR, LoraConfig, StudentConfig

#: The name that peft gives it.
ADAPTER_WEIGHTS = "adapter_model.safetensors"

#: Where a finished run keeps its adapters, under its directory.
ADAPTER_DIR = "adapter"


def adapt(model: Any, config: StudentConfig, name: str) -> Any:
    """Freeze ``model``, put adapters into it in place and return the ``PeftModel`` around it.

    The adapted model starts out equal to ``model``; ``config.seed`` decides the adapters' random halves. ``name`` is
    for messages. Raises ``ConfigError`` when peft is not installed, ``StudentError`` when a target
    module does not exist or cannot be adapted.
    """
    assert config.lora is not None
    peft = _peft()
    _check_targets(model, config.lora, name)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        revision=config.revision,
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=ALL_LINEAR if config.lora.target_modules == ALL_LINEAR else list(config.lora.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model, settings)


def save_adapter(adapter: Any, directory: str | Path) -> None:
    """Write the adapters in peft's format: ``PeftModel.from_pretrained(base, directory)`` loads them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = _peft().get_peft_model_state_dict(adapter, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / ADAPTER_WEIGHTS)
    adapter.peft_config["default"].save_pretrained(str(directory))


def load_adapter(adapter: Any, directory: str | Path) -> None:
    """Load the adapters that `save_adapter` wrote for the same settings."""
    weights = load_file(Path(directory) / ADAPTER_WEIGHTS)
    outcome = _peft().set_peft_model_state_dict(adapter, weights)
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if missing or outcome.unexpected_keys:
        odd = [*missing, *outcome.unexpected_keys][0]
        raise StudentError(
            f"{Path(directory) / ADAPTER_WEIGHTS} does not hold the adapters of this student ({odd} is missing or not "
            "expected); begin a new run in another directory"
        )


def merge_adapter(adapter: Any) -> None:
    """Merge the adapters into the weights; the model inside is a plain one afterwards."""
    adapter.merge_and_unload()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("student.lora needs the package peft; install it with pip install 'kdcache[lora]'") from None
    return peft


def _check_targets(model: Any, lora: LoraConfig, name: str) -> None:
    """Reject target modules that do not exist (peft ignores them among others) or cannot be adapted."""
    if lora.target_modules == ALL_LINEAR:
        return
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = dict(model.named_modules())
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    known = {path.rpartition(".")[2] for path in linear if modules[path] not in embeddings}
    for target in lora.target_modules:
        found = [path for path in modules if path == target or path.endswith(f".{target}")]
        if any(modules[path] in embeddings for path in found):
            raise StudentError(
                f"student.lora.target_modules: {target!r} is the LM head or the embeddings of student {name}, which "
                "cannot be adapted (the losses use the head's weight itself); name linear layers of the "
                f"body, such as {', '.join(sorted(known))}"
            )
        if not found or not set(found) <= set(linear):
            what = "is not a linear layer" if found else "does not exist"
            raise StudentError(
                f"student.lora.target_modules: {target!r} {what} in student {name} ({type(model).__name__}), "
                f"{did_you_mean(target, known)}"
            )
