"""Loading a causal language model and its tokenizer from a hub id, a directory or a GGUF file.

Only what is loaded differs between teachers and students; what goes wrong is the same, so the messages live here. Code
from model repositories is never run (``trust_remote_code`` stays off): a cache may name a stranger's model.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdcache.errors import ConfigError, KdcacheError, did_you_mean

#: Names of dtypes as settings write them.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def parse_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``; raises ``ConfigError``."""
    if name not in DTYPES:
        raise ConfigError(f"there is no dtype {name!r}, {did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def source_arguments(name: str) -> dict[str, Any]:
    """Return the arguments that make ``from_pretrained`` load ``name``: a hub id, a directory or a GGUF file."""
    if name.endswith(".gguf") and os.path.isfile(name):
        path = Path(name)
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def load_causal_lm(
    name: str, *, dtype: torch.dtype | None, revision: str | None = None, error: type[KdcacheError] = KdcacheError
) -> Any:
    """Load the causal language model ``name`` in ``dtype`` (None: the checkpoint's own) on the CPU, in eval mode.

    Raises ``error`` when there is no such model or it is not a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = source_arguments(name)
    is_gguf = "gguf_file" in arguments
    _check_not_an_adapter(name, error)
    with _readable_failures(name, error):
        if not is_gguf:
            _check_architecture(AutoConfig.from_pretrained(name, revision=revision), name, error)
        if is_gguf:
            from transformers import GgufConfig

            # Without it the model believes that it is still quantised and refuses .float() and saving.
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                **arguments, revision=revision or "main", dtype=dtype or "auto", output_loading_info=True
            )
    if missing := sorted(report["missing_keys"]):
        # Otherwise they would silently be random numbers.
        raise error(
            f"{name} lacks {len(missing)} of the weights of a {type(model).__name__}, such as {missing[0]}: it is "
            "incomplete or not a causal language model"
        )
    return model.eval()


def load_tokenizer(name: str, *, revision: str | None = None, error: type[KdcacheError] = KdcacheError) -> Any:
    """Load the tokenizer of ``name``; raises ``error`` when it has none."""
    from transformers import AutoTokenizer

    with _readable_failures(name, error), quiet():
        return AutoTokenizer.from_pretrained(**source_arguments(name), revision=revision or "main")


def _check_not_an_adapter(name: str, error: type[KdcacheError]) -> None:
    path = Path(name)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise error(
            f"{name} holds adapters (LoRA) of another model, no model; give the directory of a finished run, whose "
            "model has its adapters merged, or merge them with peft"
        )


def _check_architecture(config: Any, name: str, error: type[KdcacheError]) -> None:
    architectures = list(config.architectures or [])
    if getattr(config, "is_encoder_decoder", False):
        raise error(f"{name} is an encoder-decoder ({config.model_type}), not a causal language model")
    causal = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))]
    if architectures and not causal:
        raise error(f"{name} is a {architectures[0]}, not a causal language model (task causal-lm needs one)")


@contextlib.contextmanager
def _readable_failures(name: str, error: type[KdcacheError]) -> Iterator[None]:
    try:
        yield
    except KdcacheError:
        raise
    except ImportError as failure:
        hint = "; install it with pip install 'kdcache[gguf]'" if name.endswith(".gguf") else ""
        raise error(f"{name} needs a package that is not installed: {first_line(failure)}{hint}") from None
    except Exception as failure:  # transformers, tokenizers, safetensors and the hub client have no common base
        looks_local = os.path.exists(name) or name.startswith((".", "/", "~")) or name.endswith(".gguf")
        if looks_local and not os.path.exists(name):
            raise error(f"there is no model at {name}") from None
        where = "" if looks_local else " (not a local path; as a hub id it could not be loaded either)"
        raise error(f"cannot load {name}{where}: {first_line(failure)}") from None


def first_line(failure: BaseException) -> str:
    """Return the first line of a foreign error's message, and the next one if that ends in a colon.

    The rest is advice to callers of that library.
    """
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [type(failure).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's bars and notes on loading and saving: the commands print their own progress."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
