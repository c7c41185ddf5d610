"""Judge students against a cache: how well they do the task, and how close they came to the teacher.

The teacher's row comes from the cache alone. Students are run over the cache once each, shard by shard (a batch over
all shards would read each again and again), in batches of similar length under a token budget. What is measured depends
on what the task's teachers give: distributions (module `distributions`) or numbers (`answers`, `measures`).

Judge on a cache of texts that no student was trained on. A student whose ``kdcache_run.json`` names this very cache
gets a warning: such numbers say how well it was fitted, not how well it generalises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError
from kdcache.evaluate.answers import judge_answers
from kdcache.evaluate.distributions import judge_distributions
from kdcache.evaluate.measures import Metrics
from kdcache.evaluate.retrieval import load_retrieval
from kdcache.evaluate.table_rows import Evaluation, ModelRow
from kdcache.evaluate.texts import check_texts, judge_texts
from kdcache.models.batching import batches_by_length
from kdcache.models.loading import pick_device
from kdcache.students import Student, StudentConfig, load_student
from kdcache.students.run_file import read_run
from kdcache.tasks import task_of
from kdcache.tasks.embedding import Embedding

#: Not what lies beside a model, such as the parameters of an objective's terms.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*_Dense/model.safetensors")


def evaluate_students(
    cache_path: str,
    students: Sequence[str],
    *,
    batch_tokens: int = 8192,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    limit_sequences: int | None = None,
    qrels: str | None = None,
    id_column: str | None = None,
    generate: int | None = None,
    beams: int = 1,
    progress: bool = True,
) -> Evaluation:
    """Score the ``students`` (directories or hub names) on the cache at ``cache_path``.

    ``batch_tokens`` bounds the padded tokens of a batch (one sequence may exceed it). ``limit_sequences`` takes that
    many sequences, evenly spread over the cache. ``qrels`` is a file of relevant documents, for embeddings of queries
    and documents, whose ids stand in the column ``id_column`` (see ``kdcache.evaluate.retrieval``). With
    ``generate``, students of task seq2seq-lm write that many texts, by so many ``beams`` (see
    ``kdcache.evaluate.texts``).

    Raises ``StudentError`` for a student that cannot be loaded or has another tokenizer, before anything is scored;
    ``CacheError`` for a cache that cannot be used; ``ConfigError`` for settings that do not fit it.
    """
    for name, value in (("batch_tokens", batch_tokens), ("limit_sequences", limit_sequences)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    cache = open_cache(cache_path)
    if generate is not None:
        check_texts(cache, generate, beams)
    torch_device = pick_device(device)
    batches = list(_batches(cache, batch_tokens, limit_sequences))
    loaded = {name: _load(name, cache, dtype) for name in students}
    gives_numbers = task_of(cache.manifest.task).gives == "outputs"
    judge = _judge_of_numbers(cache, qrels, id_column, limit_sequences) if gives_numbers else judge_distributions
    if qrels is not None and not gives_numbers:
        raise ConfigError(f"qrels judge embeddings, and the cache is of task {cache.manifest.task}; leave them out")
    teacher, rows, num_targets = judge(cache, loaded, batches, torch_device, progress)
    if generate is not None:
        of_teacher, of_students = judge_texts(
            cache, loaded, generate, beams=beams, batch_tokens=batch_tokens, device=torch_device, progress=progress
        )
        teacher = _with_metrics(teacher, of_teacher)
        rows = {name: _with_metrics(row, of_students[name]) for name, row in rows.items()}
    return Evaluation(
        cache=str(cache_path),
        fingerprint=cache.fingerprint,
        num_sequences=sum(map(len, batches)),
        num_targets=num_targets,
        teacher=teacher,
        students=tuple(_with_facts(name, rows[name], cache) for name in students),
    )


def _judge_of_numbers(cache: Cache, qrels: str | None, id_column: str | None, limit: int | None) -> Any:
    if qrels is None:
        return judge_answers
    if cache.manifest.task != Embedding.name or limit is not None:
        found = f"of task {cache.manifest.task}" if limit is None else "searched in part only (limit_sequences)"
        raise ConfigError(f"qrels are for a whole cache of task {Embedding.name}, and this one is {found}")
    return partial(judge_answers, more=load_retrieval(cache, qrels, id_column).measure)


def _load(name: str, cache: Cache, dtype: Literal["float32", "bfloat16"]) -> Student:
    student = load_student(StudentConfig(model=name, dtype=dtype), cache.manifest, cache.tokenizer_dir())
    student.model.eval()
    return student


def _batches(cache: Cache, batch_tokens: int, limit_sequences: int | None) -> Iterator[list[int]]:
    """Yield the sequences of one batch after another, of similar length, all of one shard.

    Each shard is read once a pass. The shard with the longest sequence comes first, so that memory fails early.
    """
    indices = np.arange(len(cache))
    if limit_sequences is not None and limit_sequences < len(cache):
        indices = np.linspace(0, len(cache) - 1, limit_sequences).round().astype(np.int64)
    shards = np.searchsorted(cache.shard_starts, indices, side="right")
    groups = np.split(indices, np.flatnonzero(np.diff(shards)) + 1)
    for group in sorted(groups, key=lambda group: -int(cache.sizes_N[group].max())):
        for batch in batches_by_length(cache.sizes_N[group], batch_tokens):
            yield np.sort(group[batch]).tolist()


def _with_metrics(row: ModelRow, metrics: Metrics) -> ModelRow:
    return row.model_copy(update={"metrics": row.metrics | metrics})


def _with_facts(name: str, row: ModelRow, cache: Cache) -> ModelRow:
    facts: dict[str, Any] = {"num_bytes": weight_bytes(name), "warnings": _warnings(name, cache)}
    return row.model_copy(update=facts)


def weight_bytes(name: str) -> int | None:
    """Return the bytes of the weight files of a local model; None for one from the hub."""
    path = Path(name)
    if not path.exists():
        return None
    files = [path] if path.is_file() else [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)


def _warnings(name: str, cache: Cache) -> tuple[str, ...]:
    trained_on = (read_run(name) or {}).get("cache", {})
    if trained_on.get("fingerprint") == cache.fingerprint:
        return (f"{name} was trained on this very cache, so its numbers are not held out",)
    if trained_on.get("corpus") == cache.manifest.corpus.fingerprint:
        return (f"{name} was trained on a cache of the same texts, so its numbers are not held out",)
    return ()
