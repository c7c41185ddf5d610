"""Load students: a pretrained model, or a fresh one from a configuration file or of a named size.

A student must use the token ids of the cache. A fresh one is built around the cache's tokenizer. A pretrained one has
its own, which must have the same content; a model without tokenizer files is accepted when its vocabulary is large
enough, with a warning. Rows of the student beyond the true vocabulary (padding to a round number) are removed, and its
special ids become the tokenizer's: see `kdcache.students.vocabulary`.

How models are found and their failures reported is shared with teachers: `kdcache.models.loading`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from kdcache.cache import Cache
from kdcache.errors import ConfigError, StudentError
from kdcache.models.bodies import Parts, context_length, fed, num_input_ids, probe_inputs, split_for
from kdcache.models.lm_head import LMHead
from kdcache.models.loading import (
    TOKENIZER_FILES,
    check_loadable,
    load_cache_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    parse_dtype,
    quiet,
)
from kdcache.models.packing import keeps_documents_apart
from kdcache.models.padding import without_padding
from kdcache.models.tokenizer import describe_difference, pad_id_of
from kdcache.models.trying import failures_of, in_eval_mode
from kdcache.schema import Manifest
from kdcache.students.config import StudentConfig
from kdcache.students.fresh import build_fresh, head_settings, max_length
from kdcache.students.layers import with_layers
from kdcache.students.lora import adapt
from kdcache.students.rankers import make_ranker, task_of_student
from kdcache.students.run_file import read_run
from kdcache.students.sentence_model import SentenceModel, sentence_model
from kdcache.students.vocabulary import align_special_ids, keep_chat_template, trim_rows
from kdcache.tasks import Task, task_of

logger = logging.getLogger(__name__)


@dataclass
class Student:
    """A student that fits a cache: its model, the cache's tokenizer, and the model's body and head (``parts``).

    ``vocab_size`` is the true number of tokens, or of classes or other outputs.
    """

    model: Any
    tokenizer: Any
    parts: Parts
    vocab_size: int
    adapter: Any = None
    """The ``PeftModel`` around the model, where only adapters are trained (see ``kdcache.students.lora``)."""
    sentence: SentenceModel | None = None
    """How the model embeds texts, if it does (bi-encoders too)."""

    @property
    def head(self) -> LMHead:
        """The head over the true vocabulary, built from the model's current parameters.

        Made anew at each access: a view of the weight that outlives a step would keep that step's autograd graph.
        """
        return self.parts.head().narrow(self.vocab_size)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the finished model, tied ones counted once; adapters are merged and not counted."""
        num_adapters = 0 if self.adapter is None else self.num_trainable_parameters
        return sum(parameter.numel() for parameter in self.model.parameters()) - num_adapters

    @property
    def num_trainable_parameters(self) -> int:
        """Number of parameters that are trained: all, or those of the adapters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def pad_id(self) -> int:
        """The id to pad with."""
        return pad_id_of(self.tokenizer)

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the last hidden states [P, D] of the real positions of a collated batch."""
        return self.states(batch)[0]

    def states(self, batch: Mapping[str, Tensor], layers: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the last hidden states [P, D] of the real positions of a collated batch, and those of ``layers``.

        Layers are numbered as those of the teacher in a cache: 0 is the embeddings, n the state after block n, the
        last one that after the final norm.
        """
        output = self.parts.body(**fed(batch), **({"output_hidden_states": True} if layers else {}))

        def real(states_BLD: Tensor) -> Tensor:
            return states_BLD.flatten(0, 1)[batch["rows"]]

        last_PD = real(output.last_hidden_state)
        last = len(output.hidden_states) - 1 if layers and self.parts.last_is_state else None
        return last_PD, {n: last_PD if n == last else real(output.hidden_states[n]) for n in sorted(layers)}

    @torch.no_grad()
    def layer_widths(self) -> tuple[int, ...]:
        """Return the width of every layer's state, from the embeddings to the last one, from a trial run.

        Raises `StudentError` where the architecture does not return its states.
        """
        with in_eval_mode(self.model):
            output = self.parts.body(**probe_inputs(self.model), output_hidden_states=True)
        states = getattr(output, "hidden_states", None)
        if not states:
            raise StudentError(
                f"the student's architecture ({type(self.model).__name__}) does not return the states of its layers, "
                "which the objective's hidden-state terms need; remove these terms, or choose another student"
            )
        last = output.last_hidden_state if self.parts.last_is_state else states[-1]
        return (*(state.shape[-1] for state in states[:-1]), last.shape[-1])

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass: less memory, more time, the same gradients.

        Raises `StudentError` where the architecture does not support it.
        """
        try:
            with quiet():
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            raise StudentError(
                f"gradient_checkpointing: the architecture {type(self.model).__name__} does not support it; switch it "
                "off and lower batch_sequences (with more gradient_accumulation) to save memory"
            ) from None


def load_student(
    config: StudentConfig,
    manifest: Manifest,
    tokenizer_dir: str | Path,
    *,
    longest: int | None = None,
    is_trained: bool = True,
) -> Student:
    """Load or build the student of ``config`` and check that it fits the cache of ``manifest``.

    ``tokenizer_dir`` holds the cache's tokenizer files. ``longest`` is the length of the cache's longest input
    (`longest_input`; default: the most that its settings allow). A student that is trained loses the rows of its
    vocabulary that no token has, and a head that its checkpoint lacks begins at random; one that is evaluated keeps
    the rows, and must have the head.

    Raises `StudentError` for a model that cannot be loaded, is not of the cache's task, has another tokenizer, too few
    ids or too few positions; `ConfigError` for a configuration file that cannot be read.
    """
    tokenizer = load_cache_tokenizer(tokenizer_dir)
    name = config.model or config.config_file or f"of size {config.size}"
    task = task_of_student(config, manifest)
    if config.is_fresh:
        model = build_fresh(config, manifest, tokenizer, name, task)
    else:
        check_finished(name)
        model = _load_pretrained(config, task, manifest, name, may_lack_head=is_trained)
        _check_tokenizer(config, manifest, tokenizer, name)
        with failures_of(model, f"student {name}", task.name, StudentError):
            _check_num_ids(num_input_ids(model), manifest, name)
            if task.gives != "outputs":
                trim_rows(model, manifest.tokenizer.vocab_size, name, remove=is_trained)
                align_special_ids(model, tokenizer, task)
    if task.body == "logits" and getattr(model.config, "pad_token_id", None) is None:
        # Decoders that classify find the last token of a text by it, also outside of kdcache.
        model.config.pad_token_id = tokenizer.pad_token_id
    ranker = make_ranker(model, task, tokenizer, config, manifest)
    sentence = ranker or sentence_model(model, config, manifest, task, name)
    with failures_of(model, f"student {name}", task.name, StudentError):
        student = _fit(model, task, tokenizer, manifest, name, sentence, longest)
    if config.lora is not None:
        _check_lora(task)
        student.adapter = adapt(student.model, config, name)
    return student


def check_pretrained(config: StudentConfig, manifest: Manifest, tokenizer_dir: str | Path) -> None:
    """Check a pretrained student by its files, without its weights.

    Raises what `load_student` raises for a model that does not exist, is not of the cache's task, or has another
    tokenizer, other classes or too few ids; what only the weights tell is left to `load_student`.
    """
    assert config.model is not None
    check_finished(config.model)
    task = task_of_student(config, manifest)
    found = check_loadable(config.model, task, revision=config.revision, error=StudentError)
    _check_classes(config, manifest, config.model)
    _check_num_ids(getattr(found.get_text_config(), "vocab_size", None), manifest, config.model)
    own = own_tokenizer(config.model, config.revision)
    if own is not None:
        _check_same_ids(own, load_cache_tokenizer(tokenizer_dir), config.model)


def _load_pretrained(config: StudentConfig, task: Task, manifest: Manifest, name: str, may_lack_head: bool) -> Any:
    _check_classes(config, manifest, name)
    set_seed(config.seed)  # of a head that the checkpoint may lack
    model = load_model(
        name,
        task,
        dtype=parse_dtype(config.dtype),
        revision=config.revision,
        error=StudentError,
        may_lack_head=may_lack_head,
        **head_settings(task, manifest),
    )
    return model if config.keep_layers is None else with_layers(model, config.keep_layers, name)


def _check_classes(config: StudentConfig, manifest: Manifest, name: str) -> None:
    """Reject a classifier with the classes of the cache in another order: its head would mean something else."""
    if manifest.outputs is None or not manifest.outputs.labels:
        return
    own_config = load_config(name, revision=config.revision, error=StudentError)
    own = tuple(str(own_config.id2label[number]) for number in sorted(own_config.id2label))
    if own != manifest.outputs.labels and sorted(own) == sorted(manifest.outputs.labels):
        raise StudentError(
            f"student {name} has the classes {', '.join(own)}, in another order than the cache "
            f"({', '.join(manifest.outputs.labels)}); start from the model without its head, or reorder its classes"
        )


def _check_lora(task: Task) -> None:
    if not task.is_causal:
        raise ConfigError(f"student.lora supports task causal-lm only, and the cache is of task {task.name}; remove it")


def _fit(
    model: Any,
    task: Task,
    tokenizer: Any,
    manifest: Manifest,
    name: str,
    sentence: SentenceModel | None,
    longest: int | None,
) -> Student:
    vocab_size = manifest.tokenizer.vocab_size
    _check_length(model, name, longest, max_length(manifest))
    _check_finite(model, name)
    _check_packing(model, manifest, name)
    parts = split_for(task.body, model, manifest.outputs if sentence is None else sentence.outputs)
    if parts is None:
        raise StudentError(
            f"student {name} ({type(model).__name__}) cannot be split into a body and an LM head that reproduce its "
            "logits; choose another architecture"
        )
    if task.is_causal and not _is_causal(model, parts.body, vocab_size):
        raise StudentError(
            f"student {name} ({type(model).__name__}) lets a position see later tokens, so it is not a causal language "
            "model; choose a decoder"
        )
    parts = replace(parts, body=without_padding(parts.body, model, f"student {name}", StudentError))
    num_ids = manifest.num_ids if task.gives != "outputs" else parts.head().vocab_size
    return Student(model, tokenizer, parts, num_ids, sentence=sentence)


def longest_input(cache: Cache) -> int:
    """Return the length of the longest input of a model of the cache's task; it may be less than max_length allows."""
    allowed = max_length(cache.manifest)
    if not len(cache):
        return allowed
    if task_of(cache.manifest.task).is_causal:
        return int(cache.lengths_N.max())
    return min(allowed, int(cache.sizes_N.max()) + 1)  # sizes_N is one less than the tokens


def _check_length(model: Any, name: str, longest: int | None, allowed: int) -> None:
    positions = context_length(model)
    if positions is None or positions >= (allowed if longest is None else longest):
        return
    found = f"may have up to {allowed} (its max_length)" if longest is None else f"have up to {longest}"
    raise StudentError(
        f"student {name} takes at most {positions} positions, but sequences of the cache {found}: choose another "
        "student or dump with a smaller max_length"
    )


def check_finished(name: str) -> None:
    """Raise `StudentError` when ``name`` is the directory of a training run that has not finished."""
    path = Path(name)
    record = read_run(path) if path.is_dir() else None
    if record is None or record.get("status") != "running":
        return
    saved = sorted(path.glob("checkpoint-*/config.json"), key=lambda file: file.stat().st_mtime)
    advice = f", or take its last checkpoint, {saved[-1].parent}" if saved else ""
    raise StudentError(
        f"{name} is a training run that has not finished; run its command again, which resumes it{advice}"
    )


def _check_tokenizer(config: StudentConfig, manifest: Manifest, tokenizer: Any, name: str) -> None:
    own = own_tokenizer(name, config.revision)
    if own is None:
        logger.warning(
            "student %s has no tokenizer files: it is assumed that its ids mean what the cache's %d ids mean",
            name,
            manifest.tokenizer.vocab_size,
        )
        return
    _check_same_ids(own, tokenizer, name)
    keep_chat_template(tokenizer, own, name)
    if own.eos_token_id != tokenizer.eos_token_id:
        logger.warning(
            "student %s ends a text with %r, the teacher of the cache with %r: the student will learn the latter",
            name,
            own.eos_token,
            tokenizer.eos_token,
        )


def _check_same_ids(own: Any, tokenizer: Any, name: str) -> None:
    differences = describe_difference(own, tokenizer)
    if differences:
        raise StudentError(
            f"student {name} has another tokenizer than the cache: {'; '.join(differences)}. Token ids would not mean "
            "the same; choose a student with the teacher's tokenizer, or a fresh one (size or config_file)"
        )


def _check_num_ids(found: int | None, manifest: Manifest, name: str) -> None:
    vocab_size = manifest.tokenizer.vocab_size
    if found is not None and found < vocab_size:
        raise StudentError(
            f"student {name} knows {found} token ids, but the cache uses {vocab_size}: choose a model with the "
            "teacher's tokenizer"
        )


def own_tokenizer(name: str, revision: str | None = None) -> Any | None:
    """Return the tokenizer of a model, None if it has none; raises `StudentError` for one that cannot be loaded."""
    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in TOKENIZER_FILES):
        return None
    try:
        return load_tokenizer(name, revision=revision, error=StudentError)
    except StudentError as error:
        if path.exists() or "Python code" in str(error):
            raise
        return None  # on the hub there is no cheaper way to find out


def _check_finite(model: Any, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise StudentError(
                f"student {name} has weights that are NaN or infinite (in {parameter_name}), as a diverged training "
                "run leaves them; choose another checkpoint or train it again with a lower learning rate"
            )


def _check_packing(model: Any, manifest: Manifest, name: str) -> None:
    if manifest.is_packed and not keeps_documents_apart(model, manifest.tokenizer.vocab_size):
        raise StudentError(
            f"student {name} ({type(model).__name__}) reads across the packed documents of this cache, which its "
            "teacher kept apart; choose another architecture or a cache without packing"
        )


@torch.no_grad()
def _is_causal(model: Any, body: Any, vocab_size: int) -> bool:
    """Whether the first positions' hidden states stay the same when the last token changes."""
    device = next(model.parameters()).device
    tokens = torch.arange(6, device=device).remainder(vocab_size).repeat(2, 1)
    tokens[1, -1] = (tokens[1, -1] + 1) % vocab_size
    with in_eval_mode(model):
        first, second = body(input_ids=tokens).last_hidden_state
    # Rounding aside, what reads ahead moves earlier positions by a share of what the last one moves: the smaller, the
    # smaller the weights, and those of a fresh student are small.
    moved = (first - second).abs().float()
    rounding = 16 * torch.finfo(first.dtype).eps * float(first.abs().max())
    return float(moved[:-1].max()) <= max(rounding, 3e-5 * float(moved[-1].max()))
