"""The backend ``transformers``: Hugging Face models, run in this process.

What its raw outputs are (the classes of a classifier and their names, the pooling of an embedding model) follows from
the model's configuration alone, before any weights are loaded: sequences are planned with it, and students get it from
the cache. torch and transformers are imported when something is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.errors import TeacherError
from kdcache.models.loading import check_dtype, load_config, load_tokenizer, pick_device
from kdcache.schema import OutputsRecord
from kdcache.tasks import Task
from kdcache.teachers.base import Backend
from kdcache.teachers.config import TeacherConfig

if TYPE_CHECKING:
    from kdcache.models.tokenizer import TextEncoder
    from kdcache.teachers.huggingface import HuggingFaceTeacher


class TransformersBackend(Backend):
    """Hugging Face models, run in this process; they have logits."""

    name = "transformers"
    config = TeacherConfig

    def check(self, config: TeacherConfig) -> None:
        if config.dtype != "auto":
            check_dtype(config.dtype)
        pick_device(config.device)

    def load_tokenizer(self, config: TeacherConfig) -> Any:
        return load_tokenizer(config.model, revision=config.revision, error=TeacherError)

    def num_ids(self, config: TeacherConfig) -> int | None:
        found = load_config(config.model, revision=config.revision, error=TeacherError).get_text_config()
        return getattr(found, "vocab_size", None)

    def outputs_record(
        self, config: TeacherConfig, task: Task, settings: Any, encoder: TextEncoder
    ) -> OutputsRecord | None:
        return outputs_record(config, task, settings, encoder)

    def load(
        self,
        config: TeacherConfig,
        vocab_size: int,
        task: Task,
        outputs: OutputsRecord | None,
        *,
        is_preview: bool = False,
    ) -> HuggingFaceTeacher:
        from kdcache.teachers.huggingface import load_teacher

        return load_teacher(config, vocab_size, task, outputs, is_preview=is_preview)


def outputs_record(config: TeacherConfig, task: Task, settings: Any, encoder: TextEncoder) -> OutputsRecord | None:
    """Describe the raw outputs of a teacher of ``task``; None for tasks that predict tokens.

    ``encoder`` is that of its tokenizer. Raises ``TeacherError`` for a model whose configuration does not fit the task.
    """
    if task.gives == "tokens":
        return None
    model_config = load_config(config.model, revision=config.revision, error=TeacherError)
    if task.body == "pooled":
        return _embedding(config, settings, model_config)
    num_labels = int(model_config.num_labels)
    if task.gives == "classes":
        if getattr(model_config, "problem_type", None) == "multi_label_classification":
            raise TeacherError(
                f"{config.model} gives every class a probability of its own (multi_label_classification), and task "
                f"{task.name} is about one class of several; choose a teacher of that kind"
            )
        if num_labels < 2:
            raise TeacherError(
                f"{config.model} has {num_labels} output, so it is a regressor or a cross-encoder; use --task "
                "sequence-regression or ranking"
            )
        names = _class_names(model_config, num_labels, config.model)
        return OutputsRecord(width=num_labels, labels=names, pair_types=encoder.pair_types)
    from kdcache.models.bi_encoder import is_bi_encoder

    if is_bi_encoder(model_config):
        raise TeacherError(
            f"{config.model} is a bi-encoder, and teachers of task {task.name} read query and document together so "
            "far; use it with --task embedding"
        )
    if num_labels != 1:
        raise TeacherError(
            f"{config.model} has {num_labels} outputs, and task {task.name} needs a model with one: use --task "
            "sequence-classification, or a teacher that was trained with num_labels=1"
        )
    return OutputsRecord(width=1, pair_types=encoder.pair_types)


def _class_names(model_config: Any, num_labels: int, name: str) -> tuple[str, ...]:
    if sorted(model_config.id2label) != list(range(num_labels)):
        raise TeacherError(
            f"id2label in the configuration of {name} numbers its {num_labels} classes "
            f"{', '.join(map(str, sorted(model_config.id2label)))}, expected 0 to {num_labels - 1}; correct its "
            "config.json"
        )
    return tuple(str(model_config.id2label[number]) for number in range(num_labels))


def _embedding(config: TeacherConfig, settings: Any, model_config: Any) -> OutputsRecord:
    from kdcache.models.pooling import SentenceModules, modules_of

    own = modules_of(config.model, config.revision) or SentenceModules("mean", True)
    width = own.width or getattr(model_config.get_text_config(), "hidden_size", None)
    if width is None:
        raise TeacherError(
            f"the configuration of {config.model} ({model_config.model_type}) names no hidden_size, the width of the "
            "states that are embedded; use another architecture"
        )
    return OutputsRecord(
        width=int(width),
        pooling=own.pooling if settings.pooling == "auto" else settings.pooling,
        normalised=own.normalised if settings.normalise == "auto" else settings.normalise,
    )
