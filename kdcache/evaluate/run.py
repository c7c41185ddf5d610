"""Evaluate students on a cache: how well they do the task, and how closely they agree with the teacher.

The teacher's row comes from the cache alone. Each student runs over the cache once, shard by shard (a batch over all
shards would read each of them repeatedly), in batches of similar length under a token budget. The metrics depend on
what the task predicts: distributions (module `distributions`) or numbers (`answers`, `measures`).

Evaluate on a cache of texts that no student was trained on. A student whose ``kdcache_run.json`` names this very cache
gets a warning: its numbers tell how well it was fitted, not how well it generalises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError
from kdcache.evaluate.answers import OutputScorer
from kdcache.evaluate.distributions import DistributionScorer
from kdcache.evaluate.measures import Metrics
from kdcache.evaluate.results import Evaluation, ModelRow
from kdcache.evaluate.retrieval import load_retrieval
from kdcache.evaluate.texts import GeneratedTexts, check_texts
from kdcache.models.batching import batches_by_length
from kdcache.models.loading import pick_device
from kdcache.students import Student, StudentConfig, load_student
from kdcache.students.load import check_pretrained
from kdcache.students.run_file import read_run
from kdcache.tasks import task_of
from kdcache.tasks.embedding import Embedding

#: Weight files of a model, without other files of a run such as the parameters of an objective's terms.
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
    """Evaluate ``students`` (directories or hub ids) on the cache at ``cache_path``.

    ``batch_tokens`` bounds the padded tokens of a batch (a single sequence may exceed it). ``limit_sequences``
    evaluates that many sequences, evenly spread over the cache. ``qrels`` is a file of relevant documents, for
    embeddings of queries and documents whose ids are in the column ``id_column`` (see ``kdcache.evaluate.retrieval``).
    ``generate`` is how many texts students of task seq2seq-lm write, with ``beams`` beams (see
    ``kdcache.evaluate.texts``).

    One student is in memory at a time. Raises ``StudentError`` before anything is evaluated for a student that does not
    exist, is of another task or has another tokenizer, and later for weights that cannot be used; ``CacheError`` for a
    cache that cannot be used; ``ConfigError`` for settings that do not fit it.
    """
    for name, value in (("batch_tokens", batch_tokens), ("limit_sequences", limit_sequences)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    cache = open_cache(cache_path)
    if generate is not None:
        check_texts(cache, generate, beams)
    torch_device = pick_device(device)
    configs = {name: StudentConfig(model=name, dtype=dtype) for name in students}
    for config in configs.values():
        check_pretrained(config, cache.manifest, cache.tokenizer_dir())
    batches = list(_batches(cache, batch_tokens, limit_sequences))
    scorer = _scorer(cache, batches, torch_device, progress, qrels, id_column, limit_sequences)
    texts = None
    if generate is not None:
        texts = GeneratedTexts(cache, generate, beams=beams, batch_tokens=batch_tokens, progress=progress)
    teacher, num_targets = scorer.teacher()
    if texts is not None:
        teacher = _with_metrics(teacher, texts.teacher())
    rows = {}
    for name, config in configs.items():
        student = load_student(config, cache.manifest, cache.tokenizer_dir())
        student.model.eval().to(torch_device)
        row = scorer.student(name, student)
        if texts is not None:
            row = _with_metrics(row, texts.student(name, student))
        rows[name] = _with_facts(name, row, cache)
        del student  # before the next one is loaded
    return Evaluation(
        cache=str(cache_path),
        fingerprint=cache.fingerprint,
        num_sequences=sum(map(len, batches)),
        num_targets=num_targets,
        teacher=teacher,
        students=tuple(rows[name] for name in students),
    )


class _Scorer(Protocol):
    """What evaluates the models of a cache: its teacher, and students one at a time."""

    def teacher(self) -> tuple[ModelRow, int]: ...

    def student(self, name: str, student: Student) -> ModelRow: ...


def _scorer(
    cache: Cache,
    batches: Sequence[list[int]],
    device: torch.device,
    progress: bool,
    qrels: str | None,
    id_column: str | None,
    limit: int | None,
) -> _Scorer:
    if task_of(cache.manifest.task).gives != "outputs":
        if qrels is not None:
            raise ConfigError(
                f"qrels are for task {Embedding.name}, and the cache is of task {cache.manifest.task}; remove them"
            )
        return DistributionScorer(cache, batches, device, progress)
    if qrels is None:
        return OutputScorer(cache, batches, device, progress)
    if cache.manifest.task != Embedding.name or limit is not None:
        found = f"is of task {cache.manifest.task}" if limit is None else "is searched in part (limit_sequences)"
        raise ConfigError(
            f"qrels need a whole cache of task {Embedding.name}, and this one {found}; remove one of them"
        )
    return OutputScorer(cache, batches, device, progress, load_retrieval(cache, qrels, id_column).measure)


def _batches(cache: Cache, batch_tokens: int, limit_sequences: int | None) -> Iterator[list[int]]:
    """Yield batches of sequences of similar length from one shard each.

    Each shard is read once a pass. The shard with the longest sequence comes first, so that a lack of memory is seen
    early.
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
