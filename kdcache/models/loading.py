"""Load the model of a task and its tokenizer from a hub id, a directory or a GGUF file.

Teachers and students are loaded here, so that both report the same mistakes in the same words. Code from model
repositories never runs: a cache may name the model, and may contain the tokenizer, of somebody you do not know.

- Every load passes ``trust_remote_code=False``; without it transformers would ask on standard input. A model or a
  tokenizer that transformers has a class for is loaded with that class, and the reference to the other one (auto_map)
  is dropped, so that no student that is saved hands it on. Others are refused.
- Pickled weights are read by torch's unpickler for weights alone (``weights_only``), which runs no code.
- Attention from another repository, which is compiled code, and weights outside the model's directory are refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import CacheError, ConfigError, KdcacheError, did_you_mean, first_line, shortened
from kdcache.words import count

if TYPE_CHECKING:
    import torch

    from kdcache.tasks import Task

log = logging.getLogger(__name__)

#: Names of dtypes in settings, and torch's names of them.
DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float64": "float64",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
#: What older checkpoints have in their layers beside the weights: masks and tables, which newer models compute.
_OLD_BUFFERS = re.compile(
    r"(attn|attention)\.(bias|masked_bias|causal_mask)$|inv_freq$|(cos|sin)_cached$|position_ids$|relative_attention_bias|"
    r"_scale(_inv)?$|_zero_point$|g_idx$|qzeros$|num_batches_tracked$|_extra_state$"
)
#: First bytes of what git has instead of a file that git-lfs stores.
_LFS_POINTER = b"version https://git-lfs"
#: Files of which a directory has at least one if it has a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
#: Passed to every load: ``None``, the default of transformers, asks on standard input and runs the code after a "y".
_NO_FOREIGN_CODE = {"trust_remote_code": False}


def check_dtype(name: str) -> None:
    """Raise ``ConfigError`` for an unknown dtype; imports no torch."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; {did_you_mean(name, DTYPES)}")


def parse_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``; raises ``ConfigError``."""
    import torch

    check_dtype(name)
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Raises ``ConfigError`` for a device that cannot hold an array.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("meta tensors have no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def source_arguments(name: str) -> dict[str, Any]:
    """Return the arguments with which ``from_pretrained`` loads ``name``: a hub id, a directory or a GGUF file."""
    if name.endswith(".gguf") and os.path.isfile(name):
        path = Path(name)
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def load_model(
    name: str,
    task: Task,
    *,
    dtype: torch.dtype | None,
    revision: str | None = None,
    error: type[KdcacheError] = KdcacheError,
    may_lack_head: bool = False,
    **settings: Any,
) -> Any:
    """Load the model ``name`` for ``task`` in ``dtype`` (None: the checkpoint's own) on the CPU, in eval mode.

    With ``may_lack_head`` the checkpoint need not have the weights of the task's head, only those of the model under
    it; the head is then initialised at random, from torch's generator in its current state. ``settings`` go into the
    model's configuration. Raises ``error`` if there is no such model or it does not fit the task.
    """
    import transformers

    from kdcache.models.gguf_files import forget

    arguments = source_arguments(name)
    is_gguf = "gguf_file" in arguments
    if not is_gguf:
        check_loadable(name, task, revision=revision, error=error)
    with _readable_failures(name, error):
        if is_gguf:
            # Without it the model counts as quantised, and .float() and saving fail.
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with quiet():
            model, report = getattr(transformers, task.model_class).from_pretrained(
                **arguments,
                **settings,
                **_NO_FOREIGN_CODE,
                revision=revision or "main",
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported here, with the names and shapes
            )
    if is_gguf:
        forget()
    _check_shapes(report, name, error)
    _check_all_used(report, model, name, error)
    _check_whole(report, model, name, task, error, may_lack_head)
    vars(model.config).pop("auto_map", None)
    if task.body == "pooled":
        from kdcache.models.pooling import drop_pooler

        drop_pooler(model)
    return model.eval()


def check_loadable(
    name: str, task: Task, *, revision: str | None = None, error: type[KdcacheError] = KdcacheError
) -> Any:
    """Return the configuration of ``name``, and raise ``error`` when that is no model of ``task`` by its files."""
    _check_not_an_adapter(name, error)
    _check_weight_files(name, error)
    config = load_config(name, revision=revision, error=error)
    _check_architecture(config, task, name, error)
    return config


def load_config(name: str, *, revision: str | None = None, error: type[KdcacheError] = KdcacheError) -> Any:
    """Load the configuration of ``name`` alone; raises ``error`` if it has none, or if it asks for foreign code."""
    import transformers

    with _readable_failures(name, error), quiet():
        config = transformers.AutoConfig.from_pretrained(
            **source_arguments(name), **_NO_FOREIGN_CODE, revision=revision or "main"
        )
    check_no_kernels(config, name, error)
    return config


def check_no_kernels(config: Any, name: str, error: type[KdcacheError]) -> None:
    """Raise ``error`` for a configuration that names attention from a repository: transformers would download it."""
    from kdcache.models.internals import attention_of  # imports torch

    for part in (config, *vars(config).values()):
        wanted = attention_of(part)
        if isinstance(wanted, str) and "/" in wanted:
            raise error(
                f"{name} asks for compiled code from a repository (attn_implementation {shortened(wanted)} in its "
                "config.json), which kdcache never runs; remove this setting"
            )


def _check_weight_files(name: str, error: type[KdcacheError]) -> None:
    """Raise ``error`` for an index whose weights do not lie beside it; transformers would read them anywhere."""
    for index in Path(name).glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue  # transformers says what is wrong with an index that it needs
        for file in sorted(map(str, files)):
            if file in ("", ".", "..") or set(file) & set("/\\:"):
                raise error(
                    f"{index} names the weights {shortened(file)}, which are no file of {name}; kdcache reads no other "
                    "files; download the model again"
                )


def _check_shapes(report: Mapping[str, Any], name: str, error: type[KdcacheError]) -> None:
    mismatched = sorted((str(key), list(found), list(wanted)) for key, found, wanted in report["mismatched_keys"])
    if mismatched:
        key, found, wanted = mismatched[0]
        raise error(
            f"the weights of {name} have other shapes than needed, such as a head with another number of classes: "
            f"{shortened(key)} is {found} there, and {wanted} by its config.json and the task; correct config.json, or "
            "choose another model, or one without a head"
        )


def _check_all_used(report: Mapping[str, Any], model: Any, name: str, error: type[KdcacheError]) -> None:
    """Raise ``error`` for weights in the model's own layers that it has no place for: it would compute without them.

    Other weights may be left over, such as heads of other tasks and encoders of images.
    """
    config, inside = model.config.get_text_config(), f"{model.base_model_prefix}."
    own = {_stack_of(key.removeprefix(inside)) for key in model.state_dict()}
    extra = []
    for key in sorted(report["unexpected_keys"]):
        stack = _stack_of(key.removeprefix(inside))
        if stack is None or stack not in own or _OLD_BUFFERS.search(key):
            continue
        number = int(key.removeprefix(inside)[len(stack) :].partition(".")[0])
        # Layers that predict several tokens at once (DeepSeek-V3) follow those of the model, and are not used here.
        num_layers = getattr(config, "num_hidden_layers", None) or 0
        if getattr(config, "num_nextn_predict_layers", None) and number >= num_layers:
            continue
        extra.append(key)
    if extra:
        raise error(
            f"{name} has {count(len(extra), 'weight')} that its config.json has no place for, such as "
            f"{shortened(extra[0])} (num_hidden_layers is {getattr(config, 'num_hidden_layers', 'not given')}), and "
            "the model would be run without; correct config.json, or download the model again"
        )


def _stack_of(key: str) -> str | None:
    """Return what stands before the first number in the name of a weight: ``layers.`` of ``layers.11.norm.weight``."""
    found = re.match(r"((?:[^.]+\.)*?)\d+\.", key)
    return found[1] if found else None


def _check_whole(
    report: Mapping[str, Any], model: Any, name: str, task: Task, error: type[KdcacheError], may_lack_head: bool
) -> None:
    # Missing weights would silently be random numbers.
    missing = sorted(report["missing_keys"])
    if task.body in ("pooled", "bi-encoder"):
        # The model's own pooler is never used here.
        missing = [key for key in missing if not key.startswith("pooler.")]
    of_head = _weights_of_head(missing, model, task)
    needed = [key for key in missing if key not in of_head]
    if needed:
        raise error(
            f"{name} lacks {len(needed)} of the weights of a {type(model).__name__}, such as {needed[0]}: it is "
            f"incomplete or no model for the task {task.name}"
        )
    if of_head and not may_lack_head:
        raise error(
            f"{name} has no head for task {task.name}: it lacks {len(of_head)} of the weights of a "
            f"{type(model).__name__}, such as {of_head[0]}, which would be random numbers; give a model that was "
            "trained for this task"
        )
    if of_head:
        log.warning(
            "%s has no head for task %s: %s of it, such as %s, begin at random",
            name,
            task.name,
            count(len(of_head), "weight"),
            of_head[0],
        )


def _weights_of_head(missing: list[str], model: Any, task: Task) -> list[str]:
    """Return those of the ``missing`` weights that belong to a head of the task that can be trained."""
    if task.is_causal or model.config.is_encoder_decoder or task.body in ("pooled", "bi-encoder"):
        return []  # heads of language models come with their bodies; embedders have none, and keys without a prefix
    inside = f"{model.base_model_prefix}."
    return [key for key in missing if not key.startswith(inside) or key.startswith(f"{inside}pooler.")]


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    error: type[KdcacheError] = KdcacheError,
    described: str | None = None,
) -> Any:
    """Load the tokenizer of ``name``, which errors call ``described``; raises ``error`` if it has none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    described = described or name
    with _readable_failures(name, error, described), quiet():
        found = AutoTokenizer.from_pretrained(**source_arguments(name), **_NO_FOREIGN_CODE, revision=revision or "main")
    if not isinstance(found, PreTrainedTokenizerBase):  # such as the pair of tokenizers of RAG
        raise error(f"{described} has a {type(found).__name__}, which is no tokenizer of texts; use another model")
    found.init_kwargs.pop("auto_map", None)
    return found


def load_cache_tokenizer(directory: str | Path) -> Any:
    """Load the tokenizer of a cache from its ``tokenizer_dir()``; raises ``CacheError``."""
    from kdcache.models.tokenizer import check_decoder

    described = "the tokenizer of the cache"
    tokenizer = load_tokenizer(str(directory), error=CacheError, described=described)
    check_decoder(tokenizer, described)
    return tokenizer


def _check_not_an_adapter(name: str, error: type[KdcacheError]) -> None:
    path = Path(name)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise error(
            f"{name} holds adapters (LoRA) of another model, no model; give the directory of a finished run, whose "
            "model has its adapters merged, or merge them with peft"
        )


def _check_architecture(config: Any, task: Task, name: str, error: type[KdcacheError]) -> None:
    if task.model_class == "AutoModel" and getattr(config, "is_encoder_decoder", False):
        raise error(
            f"{name} is an encoder-decoder ({config.model_type}), and texts are embedded by the states of an encoder "
            "or a decoder alone; choose another model"
        )
    if task.model_class == "AutoModelForMaskedLM" and getattr(config, "is_encoder_decoder", False):
        raise error(
            f"{name} is an encoder-decoder ({config.model_type}), and task {task.name} is about models that predict "
            "the masked tokens of a text itself; use --task seq2seq-lm, or choose another model"
        )
    if not task.is_causal:
        return  # missing weights are noticed when the checkpoint is loaded
    named = getattr(config, "architectures", None)
    architectures = [str(name) for name in named] if isinstance(named, list | tuple) else []
    if getattr(config, "is_encoder_decoder", False):
        raise error(f"{name} is an encoder-decoder ({config.model_type}), not a causal language model")
    causal = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))]
    if architectures and not causal:
        raise error(f"{name} is a {architectures[0]}, not a causal language model (task {task.name} needs one)")


@contextlib.contextmanager
def _readable_failures(name: str, error: type[KdcacheError], described: str | None = None) -> Iterator[None]:
    from kdcache.models.gguf_files import parsed_once
    from kdcache.models.tokenizer import without_panics

    described = described or name
    try:
        with without_panics(), parsed_once(name):
            yield
    except KdcacheError:
        raise
    except ImportError as failure:
        hint = "; install it with pip install 'kdcache[gguf]'" if name.endswith(".gguf") else ""
        raise error(f"{described} needs a package that is not installed: {first_line(failure)}{hint}") from None
    except Exception as failure:  # transformers, tokenizers, safetensors and the hub client have no common base
        if "trust_remote_code" in str(failure):
            raise error(
                f"{described} needs Python code from its own repository (auto_map in its JSON files), which kdcache "
                "never runs; use a model whose architecture and tokenizer the installed transformers has"
            ) from None
        if "weights_only" in str(failure):
            raise error(
                f"the weights of {described} are pickled with more than tensors, which may be code, and kdcache never "
                "runs it; use a copy of the model in safetensors"
            ) from None
        reason = _wrong_file(Path(name), failure, described)
        if reason is not None:
            raise error(f"cannot load {described}: {reason}") from None
        looks_local = os.path.exists(name) or name.startswith((".", "/", "~")) or name.endswith(".gguf")
        if looks_local and not os.path.exists(name):
            raise error(f"there is no model at {name}") from None
        where = "" if looks_local else " (not a local path; as a hub id it could not be loaded either)"
        reason = f"unknown {failure}" if isinstance(failure, KeyError) else first_line(failure)
        raise error(f"cannot load {described}{where}: {reason}") from None


def _wrong_file(path: Path, failure: Exception, described: str) -> str | None:
    """Say which file of a local model is the reason of a failure to load it, and what to do; None where none is found.

    The libraries below tell neither the file nor the setting.
    """
    if not path.is_dir():
        return None
    files = sorted(p for p in path.iterdir() if p.is_file())
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return (
                    f"its {file.name} is a pointer of git-lfs and not the file itself; run git lfs pull in that "
                    "directory, or download the model again"
                )
    for file in files:
        problem = _problem_of(file)
        if problem is not None:
            return f"its {file.name} {problem}; download the model again"
    if isinstance(failure, KeyError) and failure.args:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        for setting, value in settings.items():
            if value == failure.args[0]:
                return (
                    f"its config.json sets {shortened(setting)} to {shortened(value)}, which the installed "
                    "transformers does not have; correct it, or install another version of transformers"
                )
    if "tokenizer" in str(failure) and not any((path / file).is_file() for file in TOKENIZER_FILES):
        return (
            f"it has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}, ...); copy these files from the model that it was "
            "made from"
        )
    return None


def _problem_of(file: Path) -> str | None:
    """Return what is wrong with the content of a JSON or safetensors file."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "np"):
                pass
    except ValueError as error:  # of JSON and of its encoding
        return f"is no JSON ({shortened(first_line(error))})"
    except Exception as error:  # SafetensorError is no ValueError, and imported only here
        return f"cannot be read ({shortened(first_line(error))})"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's progress bars and messages on loading and saving: the commands print their own progress."""
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
