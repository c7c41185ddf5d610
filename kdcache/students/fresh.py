"""Build fresh students: random weights, with ids and lengths taken from the cache.

Vocabulary size and special ids come from the cache's tokenizer, and the model has at least as many positions as the
longest sequence of the cache, so none of these is configured again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, set_seed

from kdcache.config import read_yaml
from kdcache.errors import ConfigError, StudentError, did_you_mean, first_line
from kdcache.models.loading import check_no_kernels
from kdcache.schema import Manifest
from kdcache.students.config import StudentConfig
from kdcache.students.sizes import SIZES, llama_config
from kdcache.tasks import Task

logger = logging.getLogger(__name__)


def max_length(manifest: Manifest) -> int:
    """Return the length of the longest input of a model, a sequence of the cache or its target."""
    return max(int(manifest.sequences["max_length"]), int(manifest.sequences.get("max_target_length", 0)))


def build_fresh(config: StudentConfig, manifest: Manifest, tokenizer: Any, name: str, task: Task) -> Any:
    """Build a student of ``task`` with random weights; ``name`` is for messages. Raises `StudentError`."""
    hf_config = fresh_hf_config(config, manifest, tokenizer, task)
    set_seed(config.seed)
    try:
        auto = getattr(transformers, task.model_class)
        return auto.from_config(hf_config, dtype=getattr(torch, config.dtype))
    except (ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise StudentError(f"cannot build student {name}: {first_line(error)}") from None


def fresh_hf_config(config: StudentConfig, manifest: Manifest, tokenizer: Any, task: Task) -> Any:
    """Return the Hugging Face configuration of a fresh student, with ids and lengths taken from the cache."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    vocab_size = manifest.tokenizer.vocab_size
    if config.size is not None:
        if not task.is_causal:
            raise ConfigError(
                f"student.size is {config.size}, a decoder, and the cache is of task {task.name}; give a model, or a "
                "config_file of an architecture for that task"
            )
        # Rotary positions cost no parameters, so the student need not be limited to this cache's length.
        return llama_config(
            SIZES[config.size], vocab_size, max_position_embeddings=max(2048, max_length(manifest)), **ids
        )
    assert config.config_file is not None
    settings = _read_config_file(config.config_file)
    found = settings.get("vocab_size", vocab_size)
    if found != vocab_size:
        logger.info("vocab_size %s of %s is replaced by the cache's %d", found, config.config_file, vocab_size)
    hf_config = _hf_config(
        settings | ids | head_settings(task, manifest) | {"vocab_size": vocab_size}, config.config_file
    )
    positions = getattr(hf_config, "max_position_embeddings", None)
    if positions is not None and positions < max_length(manifest):
        hf_config.max_position_embeddings = max_length(manifest)
    return hf_config


def head_settings(task: Task, manifest: Manifest) -> dict[str, Any]:
    """Return the settings of a Hugging Face configuration that describe the outputs of the student's head."""
    outputs = manifest.outputs
    if outputs is None or task.body != "logits":
        return {}
    # Pipelines of transformers read it too: without it a student of several labels would get a sigmoid, not a softmax.
    if not outputs.labels:
        return {"num_labels": outputs.width, "problem_type": "regression"}
    names = dict(enumerate(outputs.labels))
    numbers = {name: n for n, name in names.items()}
    kind = "single_label_classification"
    return {"num_labels": len(names), "id2label": names, "label2id": numbers, "problem_type": kind}


def _read_config_file(path: str) -> dict[str, Any]:
    if Path(path).is_dir():
        path = str(Path(path) / "config.json")
    settings = _read_json(path) if path.endswith(".json") else read_yaml(path)
    if "model_type" not in settings:
        raise ConfigError(f"{path} has no 'model_type' (such as llama or gpt2), so its architecture is unknown")
    return settings


def _read_json(path: str) -> dict[str, Any]:
    # Not as YAML, which reads the 1e-05 of every Llama's rms_norm_eps as a string.
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, found {type(settings).__name__}")
    return settings


def _hf_config(settings: dict[str, Any], path: str) -> Any:
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), CONFIG_MAPPING)
        # A list of hundreds of architectures would not help.
        hint = hint if hint.startswith("did") else "transformers has no architecture of a similar name"
        raise StudentError(f"{path}: unknown model_type {model_type!r}; {hint}")
    settings.pop("auto_map", None)  # names the code of a repository, which never runs
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # configuration classes validate with exceptions of several libraries
        raise StudentError(f"{path}: {first_line(error)}") from None
    check_no_kernels(config, path, StudentError)
    return config
