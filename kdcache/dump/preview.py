"""A dry run of a dump: plan it, time a pilot of it, and write nothing."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from kdcache.cache import layout
from kdcache.cache.output_dir import check_same_plan
from kdcache.cache.shard_file import pack
from kdcache.codecs import id_dtype
from kdcache.dump.answers import request_of, staged
from kdcache.dump.config import DumpConfig
from kdcache.dump.loading import load_parts
from kdcache.dump.pilot import pilot_sequences, run_pilot
from kdcache.fields import known_fields
from kdcache.schema import Plan, Sequence
from kdcache.storage.folder import Folder
from kdcache.teachers.base import Answer

#: Positions that are sent through the teacher, after a quarter as many for warming up.
_PILOT_POSITIONS = 2048


@dataclass
class DumpPreview:
    """What a dump would do, from its plan and a timed pilot."""

    output: str
    num_documents: int
    num_empty: int
    num_too_short: int
    num_sequences: int
    num_positions: int
    num_shards: int
    num_shards_committed: int
    bytes_per_token: float
    total_bytes: int
    tokens_per_s: float
    eta_s: float
    kept_mass: float | None
    """None where the targets are no distribution."""
    teacher_loss: float | None
    """None also where the corpus has no labels, or the teacher gives no log-probability of them."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def preview_dump(config: DumpConfig, *, progress: bool = True) -> DumpPreview:
    """Plan the dump of ``config`` and time the teacher on a few batches; writes nothing.

    Raises what `dump_teacher` raises, also when the output holds another cache.
    """
    parts = load_parts(config, progress, is_preview=True)
    plan, sequences = parts.plan, parts.sequences
    committed = _committed(config.output, plan)
    run = partial(
        run_pilot,
        sequences=sequences,
        teacher=parts.teacher,
        request=request_of(plan),
        batch_tokens=parts.batch_tokens,
    )
    chosen = pilot_sequences(sequences, _PILOT_POSITIONS)
    run(chosen[: max(1, len(chosen) // 4)])  # warms up
    began = time.perf_counter()
    answer, picked = run(chosen)
    elapsed = time.perf_counter() - began
    count = answer.targets.num_positions
    num_bytes = _encoded_bytes(answer, picked, plan)
    has_distribution = plan.targets.kind != "outputs"
    gold_P = answer.targets.gold_logprob_P
    has_labels = has_distribution and gold_P is not None and not np.isnan(gold_P).all()
    left = plan.num_positions * (1 - committed / max(plan.num_shards, 1))
    return DumpPreview(
        output=config.output,
        num_documents=plan.corpus.num_documents,
        num_empty=plan.corpus.num_empty,
        num_too_short=plan.corpus.num_too_short,
        num_sequences=plan.num_sequences,
        num_positions=plan.num_positions,
        num_shards=plan.num_shards,
        num_shards_committed=committed,
        bytes_per_token=num_bytes / count,
        total_bytes=int(plan.num_positions * num_bytes / count),
        tokens_per_s=count / elapsed,
        eta_s=left * elapsed / count,
        kept_mass=float(-np.expm1(answer.targets.log_tail_P).mean()) if has_distribution else None,
        teacher_loss=float(-np.nanmean(gold_P)) if gold_P is not None and has_labels else None,
    )


def _encoded_bytes(answer: Answer, picked: list[Sequence], plan: Plan) -> int:
    tokens = np.concatenate([s.tokens_T for s in picked]).astype(id_dtype(plan.tokenizer.vocab_size))
    fields = known_fields(plan)
    values = staged(answer, fields)
    return len(pack({"tokens": tokens})) + sum(len(pack(fields[name].encode(rows))) for name, rows in values.items())


def _committed(output: str, wanted: Plan) -> int:
    """Return how many shards of the ``wanted`` cache exist; raises ``CacheError`` when ``output`` holds another."""
    folder = Folder(output)
    plan = layout.read_plan(folder)
    if plan is None:
        return 0
    check_same_plan(plan, wanted, folder)
    return layout.num_commits(folder, plan)
