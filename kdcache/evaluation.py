"""Judge students against a cache: how well they predict the corpus, and how close they came to the teacher.

The teacher's row comes from the cache alone: its log-probability of every corpus token is stored. Students are scored
by one pass over the cache each, shard by shard (a batch over all shards would read each again and again), in batches of
similar length under a token budget. Only positions whose loss mask is 1 count. KL is the forward KL at temperature 1:
exact when the cache is of the kind hidden or keeps the whole vocabulary; otherwise that of the kept ids plus one bucket
for the rest, a lower bound; an unbiased estimate where the cache holds draws. A cache of draws alone does not know the
teacher's favourite token, so what needs it is left out.

Judge on a cache of texts that no student was trained on. A student whose ``kdcache_run.json`` names this very cache
gets a warning: such numbers say how well it was fitted, not how well it generalises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from kdcache.cache import Cache, open_cache
from kdcache.config import Config
from kdcache.errors import ConfigError
from kdcache.losses import ForwardKL, TeacherContext, TeacherRows, score_positions
from kdcache.models.loading import pick_device
from kdcache.students import Student, StudentConfig, load_student
from kdcache.students.batches import to_tensors
from kdcache.students.run_record import finite, read_run
from kdcache.students.table import render_table
from kdcache.students.tally import Tally
from kdcache.tasks.causal_lm import labels
from kdcache.teaching import context_of

#: Not what lies beside a model, such as the parameters of an objective's terms.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


class ModelRow(Config):
    """The numbers of one model; losses, KL and entropy in nats, None where they make no sense or are unknown."""

    model: str
    num_parameters: int
    loss: float
    """Mean negative log-likelihood of the corpus's tokens."""
    perplexity: float
    top1_accuracy: float | None
    ece: float | None
    kl: float | None = None
    agreement: float | None = None
    """Share of positions where teacher and student favour the same token."""
    entropy: float | None = None
    kept_mass: float | None = None
    num_bytes: int | None = None
    tokens_per_s: float | None = None
    warnings: tuple[str, ...] = ()


class Evaluation(Config):
    """The teacher's row, one row per student, and what they were measured on."""

    cache: str
    fingerprint: str
    num_sequences: int
    num_targets: int
    """Positions that count."""
    teacher: ModelRow
    students: tuple[ModelRow, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the reader of the numbers must know."""
        return tuple(warning for row in self.students for warning in row.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; None for a perplexity beyond all numbers."""
        data: dict[str, Any] = finite(self.model_dump(mode="json"))
        return data

    def table(self, *, markdown: bool = False) -> str:
        """Return the rows as an aligned text table, or in Markdown; warnings follow below."""
        lines = [render_table(_COLUMNS, [self.teacher, *self.students], markdown=markdown)]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def evaluate(
    cache_path: str,
    students: Sequence[str],
    *,
    batch_tokens: int = 8192,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    limit_sequences: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score the ``students`` (directories or hub names) on the cache at ``cache_path``.

    ``batch_tokens`` bounds the padded tokens of a batch (one sequence may exceed it). ``limit_sequences`` takes that
    many sequences, evenly spread over the cache. Raises ``StudentError`` for a student that cannot be loaded or has
    another tokenizer, before anything is scored; ``CacheError`` for a cache that cannot be used.
    """
    for name, value in (("batch_tokens", batch_tokens), ("limit_sequences", limit_sequences)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    cache = open_cache(cache_path)
    torch_device = pick_device(device)
    batches = list(_batches(cache, batch_tokens, limit_sequences))
    loaded = [_load(name, cache, dtype) for name in students]
    context = context_of(cache)
    rows = [
        _student_row(name, student, cache, batches, context.to(torch_device), torch_device, progress)
        for name, student in zip(students, loaded, strict=True)
    ]
    teacher, num_targets = _teacher_row(cache, batches, progress)
    return Evaluation(
        cache=str(cache_path),
        fingerprint=cache.fingerprint,
        num_sequences=sum(map(len, batches)),
        num_targets=num_targets,
        teacher=teacher,
        students=tuple(rows),
    )


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
    for group in sorted(groups, key=lambda group: -int(cache.lengths_N[group].max())):
        order = group[np.argsort(-cache.lengths_N[group], kind="stable")]
        start = 0
        while start < len(order):
            size = max(1, batch_tokens // int(cache.lengths_N[order[start]]))
            yield np.sort(order[start : start + size]).tolist()
            start += size


def _teacher_row(cache: Cache, batches: Sequence[list[int]], progress: bool) -> tuple[ModelRow, int]:
    tally = Tally()
    for indices in tqdm(batches, desc="teacher", unit="batch", disable=not progress):
        batch = cache.read(indices)
        targets = batch.targets
        labels_P = labels(np.split(batch.tokens_T, batch.token_offsets_N1[1:-1]))
        tally.add(
            batch.loss_mask_P.astype(bool),
            top1_prob_P=np.exp(targets.logprobs_PK[:, 0]) if targets.top_k else np.zeros(len(labels_P), np.float32),
            correct_P=targets.top1_ids_P == labels_P,
            loss=-targets.gold_logprob_P,
            entropy=targets.entropy_P,
            kept_mass=-np.expm1(targets.log_tail_P),
        )
    teacher = cache.manifest.teacher
    more: dict[str, Any] = {"entropy": tally.mean("entropy"), "kept_mass": tally.mean("kept_mass")}
    if not _knows_favourite(cache):
        more |= {"top1_accuracy": None, "ece": None}
    return _row(f"{teacher.name} (teacher)", teacher.num_parameters, tally, **more), tally.num_positions


def _student_row(
    name: str,
    student: Student,
    cache: Cache,
    batches: Sequence[list[int]],
    context: TeacherContext,
    device: torch.device,
    progress: bool,
) -> ModelRow:
    student.model.to(device)
    tally, seconds, num_tokens = Tally(), 0.0, 0
    for indices in tqdm(batches, desc=name, unit="batch", disable=not progress):
        batch = {key: value.to(device) for key, value in to_tensors(cache.read(indices), student.pad_id).items()}
        started_s = time.perf_counter()
        _score(student, batch, context, tally)
        seconds += time.perf_counter() - started_s
        num_tokens += batch["labels"].numel()
    student.model.to("cpu")
    return _row(
        name,
        student.num_parameters,
        tally,
        kl=tally.mean("kl"),
        agreement=tally.mean("agreement") if _knows_favourite(cache) else None,
        num_bytes=weight_bytes(name),
        tokens_per_s=num_tokens / max(seconds, 1e-9),
        warnings=_warnings(name, cache),
    )


@torch.no_grad()
def _score(student: Student, batch: dict[str, torch.Tensor], context: TeacherContext, tally: Tally) -> None:
    teacher = TeacherRows.from_batch(batch)
    losses = {"kl": ForwardKL(weight=1.0)}
    scores = score_positions(student.hidden(batch), student.head, teacher, losses, context=context)
    top1_P = scores.top1_ids_P
    tally.add(
        batch["loss_mask"].cpu().numpy(),
        top1_prob_P=scores.top1_prob_P.cpu().numpy(),
        correct_P=(top1_P == teacher.labels_P).cpu().numpy(),
        loss=-scores.gold_logprob_P.cpu().numpy(),
        kl=scores.losses["kl"].cpu().numpy(),
        agreement=(top1_P == scores.teacher_top1_P).cpu().numpy(),
    )


def _row(name: str, num_parameters: int, tally: Tally, **more: Any) -> ModelRow:
    loss = tally.mean("loss")
    values: dict[str, Any] = {
        "loss": loss,
        # Beyond exp(700) float64 overflows; a loss like that is no perplexity worth reading anyway.
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "top1_accuracy": tally.mean("top1_accuracy"),
        "ece": tally.calibration.error,
    }
    return ModelRow(model=name, num_parameters=num_parameters, **values | more)


def _knows_favourite(cache: Cache) -> bool:
    """Whether the cache holds the teacher's most probable token: draws alone only suggest it."""
    return cache.manifest.top_k > 0


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


_COLUMNS: dict[str, tuple[str, str]] = {
    "model": ("model", "s"),
    "num_parameters": ("parameters", ",d"),
    "num_bytes": ("bytes", ",d"),
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "kl": ("KL", ".4f"),
    "agreement": ("agreement", ".4f"),
    "top1_accuracy": ("top-1", ".4f"),
    "ece": ("ECE", ".4f"),
    "entropy": ("entropy", ".4f"),
    "kept_mass": ("kept mass", ".4f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
}
