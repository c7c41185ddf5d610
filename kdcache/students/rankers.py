"""Students of task ranking: cross-encoders, as their teachers are, or bi-encoders.

A saved bi-encoder is marked as one in its own configuration, so it need not be named when a finished run is loaded. It
is a directory of sentence-transformers too (`sentence_model`).
"""

from __future__ import annotations

from typing import Any

from kdcache.errors import ConfigError, StudentError
from kdcache.models.bi_encoder import CONFIG_KEY, is_bi_encoder, mark_bi_encoder
from kdcache.models.loading import load_config
from kdcache.models.pooling import load_projection, modules_of, vector_width
from kdcache.schema import Manifest, OutputsRecord
from kdcache.students.config import StudentConfig
from kdcache.students.sentence_model import SentenceModel
from kdcache.tasks import Task, task_of
from kdcache.tasks.ranking import BI_ENCODER, Ranking


def task_of_student(config: StudentConfig, manifest: Manifest) -> Task:
    """Return the task of the student on this cache; raises `ConfigError` for an encoder that the task does not have."""
    task = task_of(manifest.task)
    if task.name == Ranking.name:
        return BI_ENCODER if _wants_bi_encoder(config) else task
    if config.encoder is not None:
        raise ConfigError(
            f"student.encoder is {config.encoder}, which is for task ranking, and the cache is of task {task.name}; "
            "remove it"
        )
    return task


def make_ranker(
    model: Any, task: Task, tokenizer: Any, config: StudentConfig, manifest: Manifest
) -> SentenceModel | None:
    """Mark the model's configuration as that of a bi-encoder or not, with how it scores pairs.

    Returns how a bi-encoder embeds the texts of a pair, None for every other student. Settings that ``config`` does not
    give come from the model's own files, those of sentence-transformers included.
    """
    if task is not BI_ENCODER:
        if hasattr(model.config, CONFIG_KEY):
            delattr(model.config, CONFIG_KEY)
        return None
    given = {} if config.bi_encoder is None else config.bi_encoder.model_dump(exclude_none=True)
    own = None if config.model is None else modules_of(config.model, config.revision, StudentError)
    if own is not None and config.model is not None:
        load_projection(model, config.model, config.revision, StudentError)
        given = {"pooling": own.pooling} | given
    chosen = mark_bi_encoder(model, tokenizer, given)
    outputs = OutputsRecord(width=vector_width(model), pooling=chosen.pooling, normalised=chosen.similarity == "cosine")
    return SentenceModel(outputs, int(manifest.sequences["max_length"]))


def _wants_bi_encoder(config: StudentConfig) -> bool:
    if config.encoder is None and config.model is not None:
        return is_bi_encoder(load_config(config.model, revision=config.revision, error=StudentError))
    return config.encoder == "bi-encoder"
