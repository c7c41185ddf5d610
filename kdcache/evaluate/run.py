"""Evaluate students on a cache: how well they do the task, and how closely they agree with the teacher.

The teacher's row comes from the cache alone. Each student runs over the cache once, shard by shard (a batch over all
shards would read each of them repeatedly), in batches of similar length under a token budget. The metrics depend on
what the task predicts: distributions (module `distributions`) or numbers (`answers`, `measures`).

Evaluate on texts that no student was trained on. A student that was trained on some of the sequences gets a warning
with their number (see `kdcache.students.trained_on`): its numbers tell how well it was fitted, not how well it
generalises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError, StudentError, shortened
from kdcache.evaluate.answers import OutputScorer
from kdcache.evaluate.distributions import DistributionScorer
from kdcache.evaluate.measures import Metrics
from kdcache.evaluate.results import Evaluation, ModelRow
from kdcache.evaluate.retrieval import load_retrieval
from kdcache.evaluate.texts import GeneratedTexts, check_texts
from kdcache.models.batching import batches_by_length
from kdcache.models.loading import load_config, pick_device
from kdcache.progress import bar
from kdcache.students import Student, StudentConfig, load_student
from kdcache.students.load import check_pretrained, longest_input
from kdcache.students.run_file import read_run
from kdcache.students.trained_on import Overlap, overlap
from kdcache.tasks import task_of
from kdcache.tasks.embedding import Embedding
from kdcache.words import count

#: Weight files of a model, without other files of a run such as the parameters of an objective's terms.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*_Dense/model.safetensors")


def evaluate_students(
    cache_path: str,
    students: Sequence[str],
    *,
    batch_tokens: int = 8192,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    where: str | None = None,
    limit_sequences: int | None = None,
    qrels: str | None = None,
    id_column: str | None = None,
    generate: int | None = None,
    beams: int = 1,
    progress: bool = True,
) -> Evaluation:
    """Evaluate ``students`` (directories or hub ids) on the cache at ``cache_path``.

    ``batch_tokens`` bounds the padded tokens of a batch (a single sequence may exceed it). ``where`` is a filter on the
    per-sequence table (`Cache.where`) that selects the sequences; ``limit_sequences`` evaluates that many of them,
    evenly spread. ``qrels`` is a file of relevant documents, for embeddings of queries and documents whose ids are in
    the column ``id_column`` (see ``kdcache.evaluate.retrieval``). ``generate`` is how many texts students of task
    seq2seq-lm write, with ``beams`` beams (see ``kdcache.evaluate.texts``).

    One student is in memory at a time. Before anything is evaluated, every student is loaded once, and ``StudentError``
    raised for one that does not exist, has not been trained to its end, is of another task, lacks its head, has another
    tokenizer or weights that cannot be used. Raises ``CacheError`` for a cache that cannot be used, ``ConfigError`` for
    settings that do not fit it.
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
    chosen_N = _chosen(cache, where, limit_sequences)
    batches = list(_batches(cache, batch_tokens, chosen_N))
    is_part = (
        None if where is None and limit_sequences is None else "where" if limit_sequences is None else "limit_sequences"
    )
    scorer = _scorer(cache, batches, torch_device, progress, qrels, id_column, is_part)
    texts = None
    if generate is not None:
        texts = GeneratedTexts(cache, chosen_N, generate, beams=beams, batch_tokens=batch_tokens, progress=progress)
    students_of = _Students(cache, configs, progress)
    students_of.check()
    teacher, num_targets = scorer.teacher()
    if texts is not None:
        teacher = _with_metrics(teacher, texts.teacher())
    rows = {}
    for name in configs:
        student = students_of.take(name)
        student.model.to(torch_device)
        row = scorer.student(name, student)
        if texts is not None:
            row = _with_metrics(row, texts.student(name, student))
        rows[name] = _with_facts(name, row, cache, chosen_N)
        del student  # before the next one is loaded
    return Evaluation(
        cache=str(cache_path),
        fingerprint=cache.fingerprint,
        where=where,
        num_sequences=len(chosen_N),
        num_targets=num_targets,
        teacher=teacher,
        students=tuple(rows[name] for name in students),
    )


class _Students:
    """The students by name, one in memory at a time; the first one stays there from the check until it is taken."""

    def __init__(self, cache: Cache, configs: Mapping[str, StudentConfig], progress: bool) -> None:
        self._cache, self._configs, self._progress = cache, configs, progress
        self._first: Student | None = None

    def check(self) -> None:
        """Load every student, so that weights that cannot be used are found before the first one is evaluated."""
        names = list(self._configs)
        with bar(len(names), "load", "student", enabled=self._progress and bool(names)) as meter:
            for name in [*names[1:], *names[:1]]:
                self._first = None
                self._first = self._load(name)
                meter.update()

    def take(self, name: str) -> Student:
        """Return a student, in eval mode; the caller keeps the only reference."""
        student, self._first = self._first, None
        return self._load(name) if student is None else student

    def _load(self, name: str) -> Student:
        cache = self._cache
        student = load_student(
            self._configs[name],
            cache.manifest,
            cache.tokenizer_dir(),
            longest=longest_input(cache),
            is_trained=False,
        )
        student.model.eval()
        return student


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
    part_by: str | None,
) -> _Scorer:
    if task_of(cache.manifest.task).gives != "outputs":
        if qrels is not None:
            raise ConfigError(
                f"qrels are for task {Embedding.name}, and the cache is of task {cache.manifest.task}; remove them"
            )
        return DistributionScorer(cache, batches, device, progress)
    if qrels is None:
        return OutputScorer(cache, batches, device, progress)
    if cache.manifest.task != Embedding.name or part_by is not None:
        found = f"is of task {cache.manifest.task}" if part_by is None else f"is searched in part ({part_by})"
        raise ConfigError(
            f"qrels need a whole cache of task {Embedding.name}, and this one {found}; remove one of them"
        )
    return OutputScorer(cache, batches, device, progress, load_retrieval(cache, qrels, id_column).measure)


def _chosen(cache: Cache, where: str | None, limit: int | None) -> NDArray[np.int64]:
    """Return the sequences to evaluate, ascending, [N]."""
    chosen_N = np.arange(len(cache)) if where is None else cache.where(where)
    if limit is not None and limit < len(chosen_N):
        chosen_N = chosen_N[np.linspace(0, len(chosen_N) - 1, limit).round().astype(np.int64)]
    return chosen_N


def _batches(cache: Cache, batch_tokens: int, indices: NDArray[np.int64]) -> Iterator[list[int]]:
    """Yield batches of sequences of similar length from one shard each.

    Each shard is read once a pass. The shard with the longest sequence comes first, so that a lack of memory is seen
    early.
    """
    shards = np.searchsorted(cache.shard_starts, indices, side="right")
    groups = np.split(indices, np.flatnonzero(np.diff(shards)) + 1)
    for group in sorted(groups, key=lambda group: -int(cache.sizes_N[group].max())):
        for batch in batches_by_length(cache.sizes_N[group], batch_tokens):
            yield np.sort(group[batch]).tolist()


def _with_metrics(row: ModelRow, metrics: Metrics) -> ModelRow:
    return row.model_copy(update={"metrics": row.metrics | metrics})


def _with_facts(name: str, row: ModelRow, cache: Cache, chosen_N: NDArray[np.int64]) -> ModelRow:
    found = overlap(name, cache, chosen_N)
    facts: dict[str, Any] = {
        "num_bytes": weight_bytes(name),
        "num_trained_on": None if found is None else found.num_trained,
        "warnings": (*_warnings(name, cache, found), *_other_classes(name, cache)),
    }
    return row.model_copy(update=facts)


def weight_bytes(name: str) -> int | None:
    """Return the bytes of the weight files of a local model; None for one from the hub."""
    path = Path(name)
    if not path.exists():
        return None
    files = [path] if path.is_file() else [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)


def _warnings(name: str, cache: Cache, found: Overlap | None) -> tuple[str, ...]:
    if found is None:  # a run of an older version: by the fingerprints
        trained_on = (read_run(name) or {}).get("cache", {})
        if trained_on.get("fingerprint") == cache.fingerprint:
            return (f"{name} was trained on this very cache, so its numbers are not held out",)
        if trained_on.get("corpus") == cache.manifest.corpus.fingerprint:
            return (f"{name} was trained on a cache of the same texts, so its numbers are not held out",)
        return ()
    if not found.num_trained:
        return ()
    share = count(found.num_trained, "sequence", of=found.num_sequences)
    about, what = "about " * found.is_estimate, "" if found.by == "sequences" else "the documents of "
    rest = "" if found.num_trained == found.num_sequences else " for these"
    return (f"{name} was trained on {what}{about}{share}, so its numbers are not held out{rest}",)


def _other_classes(name: str, cache: Cache) -> tuple[str, ...]:
    """Return a warning for a classifier whose classes have other names than those of the cache."""
    labels = () if cache.manifest.outputs is None else cache.manifest.outputs.labels
    if not labels:
        return ()
    names = load_config(name, error=StudentError).id2label
    own = tuple(str(names[number]) for number in sorted(names))
    if own == labels or all(label == f"LABEL_{number}" for number, label in enumerate(own)):
        return ()
    return (
        f"{name} calls its classes {_listed(own)}, the cache {_listed(labels)}; they are compared by their numbers",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shortened, names[:4])) + ", ..." * (len(names) > 4)
